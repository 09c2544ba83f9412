"""Aligners that do not fit the model, configurations that are wrong in themselves, and weights of something else."""

from __future__ import annotations

import pytest
import torch
from kit.aligning import aligned, logits
from kit.tiny import make_model
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model

import hf_steer
from hf_steer import AlignerConfig, ConfigError, FileError, SteerConfig, disable_steering, patch_model


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("qwen2_vl", {"modality": "audio"}, "modality 'audio' was asked for, but 'qwen2_vl' has encoders for 'image'.*qwen2_audio"),
        ("whisper", {"modality": "image"}, "modality 'image' was asked for, but 'whisper' has encoders for 'audio'.*qwen2_vl"),
        ("whisper", {"modality": "audio", "placement": "projector"}, "'whisper' lacks; use placement='output' or 'layers'"),
        ("whisper", {"modality": "audio", "placement": "layers", "layers": (3,)}, r"layers \[3\] are not there.* 3 layers.*0 to 2"),
        ("llava", {"modality": "image", "placement": "layers", "layers": (2,)}, r"layers \[2\] are not .* 2 layers that are read"),
        ("whisper", {"modality": "audio", "placement": "layers", "layers": (0, -3)}, r"names a layer twice: \[0, -3\] of 3"),
        (
            "qwen2_audio",
            {"modality": "audio", "placement": "projector", "kind": "cross_modal_features", "hidden_dim": 12, "num_heads": 8},
            "num_heads must divide 12",
        ),
    ],
)
def test_an_aligner_that_does_not_fit_is_refused(family, config, message):
    model = make_encoder_model(family)
    inputs = make_encoder_inputs(family)
    plain = logits(model, inputs)
    with pytest.raises(ConfigError, match=message):
        patch_model(model, SteerConfig(aligners=(AlignerConfig(**config),)))
    assert not hf_steer.get_steer_status(model).patched
    assert torch.equal(logits(model, inputs), plain)


def test_a_text_only_model_is_sent_to_compose():
    with pytest.raises(ConfigError, match=r"'llama' has encoders for none.*see hf_steer\.compose"):
        patch_model(make_model("llama"), SteerConfig(aligners=(AlignerConfig(modality="audio"),)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modality": "smell"}, "aligner.modality must be one of 'image', 'audio'; got 'smell'"),
        ({"placement": "inside"}, "aligner.placement must be one of"),
        ({"kind": "random"}, "aligner.kind must be one of 'simple'"),
        ({"num_experts": 0}, "aligner.num_experts must be a whole number of at least 1; got 0"),
        ({"top_k": 9}, r"aligner.top_k must be at most num_experts \(8\); got 9"),
        ({"top_k": 0}, "aligner.top_k must be a whole number of at least 1"),
        ({"num_stages": 3}, "kind 'simple' has no num_stages; it has"),
        ({"kind": "progressive", "num_global_experts": 2}, "kind 'progressive' has no num_global_experts"),
        ({"kind": "progressive", "feedback": "all"}, "aligner.feedback must be one of"),
        ({"temperature": 0.0}, "aligner.temperature must be above 0"),
        ({"load_balancing_weight": -1.0}, "aligner.load_balancing_weight must be at least 0"),
        ({"kind": "layer_wise"}, "kind 'layer_wise' goes into layers; got placement='output'"),
        ({"kind": "cross_modal_adapter"}, "reads the prompt's text.*placement='projector'"),
        ({"layers": (0,)}, "aligner.layers is for placement='layers'"),
        ({"init": "ones"}, "aligner.init must be one of"),
    ],
)
def test_a_configuration_that_is_wrong_in_itself_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        AlignerConfig(**{"modality": "audio", **config})


def test_steer_config_takes_aligners_strictly():
    ear = AlignerConfig(modality="audio", kind="progressive", feedback="steering", placement="layers", layers=(0, -1))
    config = SteerConfig(aligners=[ear], train_projector=True)
    assert config.aligners == (ear,)
    assert SteerConfig.from_dict(config.to_dict()) == config
    assert SteerConfig(aligners=ear).aligners == (ear,)
    with pytest.raises(ConfigError, match="several for audio at 'layers'; one per modality and placement"):
        SteerConfig(aligners=(ear, ear))
    with pytest.raises(ConfigError, match="aligners must be a tuple of AlignerConfig"):
        SteerConfig(aligners=("progressive",))
    written = config.to_dict()
    written["aligners"][0]["num_expert"] = 3
    with pytest.raises(ConfigError, match=r"aligners\[0\] has no 'num_expert' \(did you mean 'num_experts'\?\)"):
        SteerConfig.from_dict(written)


@pytest.mark.parametrize(
    ("saved", "patched", "message"),
    [
        (("output", "simple", {}), ("output", "simple", {"num_experts": 4}), r"weight has shape \(8, 16\), needed is \(4, 16\)"),
        (("output", "simple", {}), ("output", "progressive", {}), "has aligners .*'simple'.* patched with .*'progressive'"),
        (("output", "simple", {}), ("layers", "simple", {}), "has aligners .*'output'.* patched with .*'layers'"),
    ],
)
def test_weights_of_another_shape_or_kind_are_refused(saved, patched, message, tmp_path):
    hf_steer.save_steering(aligned("whisper", saved[0], saved[1], **saved[2]), tmp_path)
    model = aligned("whisper", patched[0], patched[1], **patched[2])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FileError, match=message):
        hf_steer.load_steering(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_family_are_refused(tmp_path):
    hf_steer.save_steering(aligned("whisper", "output", "simple"), tmp_path)
    with pytest.raises(ConfigError, match="is for 'whisper'; this model is 'hubert'"):
        hf_steer.load_steering(aligned("hubert", "output", "simple"), tmp_path)


def test_broken_or_missing_weights_are_refused(tmp_path):
    model = aligned("whisper", "output", "simple")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "hf_steer" / "steer_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match="steer_model.safetensors cannot be read.*Save it again"):
        hf_steer.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileError, match="describes trained parts.*To start with fresh ones, give the configuration itself"):
        hf_steer.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"holds trained weights .* has no .*starts fresh"):
        fresh = hf_steer.from_pretrained(tmp_path, steer_config=SteerConfig.from_pretrained(tmp_path)).eval()
    inputs = make_encoder_inputs("whisper")
    with disable_steering(model):
        assert torch.equal(logits(fresh, inputs), logits(model, inputs))
