"""Trained aligners stay when a configuration names them again, on disk and in memory; what cannot be kept is said."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import warnings

import pytest
import safetensors.torch
import torch
from kit.aligning import align, logits, stir
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model

import hf_steer
from hf_steer import (
    AlignerConfig,
    AttentionConfig,
    PatchError,
    Saliency,
    SaliencyConfig,
    SteerConfig,
    patch_model,
    unpatch_model,
    use_saliency,
)

GAZE = AttentionConfig(queries="all", heads={1: (0, 2)}, strength=3.0, saliency=SaliencyConfig(source=None))
EYE = AlignerConfig("image", "output", "simple")
TOKENS = AlignerConfig("image", "projector", "progressive")


def llava(*aligners, **options):
    model = patch_model(make_encoder_model("llava"), SteerConfig(aligners=aligners, **options))
    stir(model)
    return model


def outputs(model, statement=None):
    inputs = make_encoder_inputs("llava")
    if statement is None:
        return logits(model.eval(), inputs)
    with use_saliency(model, statement):
        return logits(model.eval(), inputs)


def hooks_of(model):
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def look():
    generator = torch.Generator().manual_seed(2)
    return Saliency.from_tokens(torch.randn(make_encoder_inputs("llava")["input_ids"].shape, generator=generator))


def test_a_folder_with_trained_aligners_keeps_them_where_the_configuration_names_them(tmp_path):
    model = llava(EYE, TOKENS)
    model.save_pretrained(tmp_path)
    for aligners in ((EYE, TOKENS), (TOKENS, EYE)):
        loaded = hf_steer.from_pretrained(tmp_path, steer_config=SteerConfig(attention=GAZE, aligners=aligners))
        assert hf_steer.get_steer_status(loaded).heads == {1: (0, 2)}
        assert torch.equal(outputs(loaded), outputs(model))
    wider = SteerConfig(aligners=(EYE, TOKENS, AlignerConfig("image", "layers", "layer_wise")))
    assert torch.equal(outputs(hf_steer.from_pretrained(tmp_path, steer_config=wider)), outputs(model))  # the third is fresh


@pytest.mark.parametrize(
    ("aligners", "named"),
    [
        ((EYE, dataclasses.replace(TOKENS, num_experts=4)), "progressive at image projector"),
        ((EYE,), "progressive at image projector"),
        ((EYE, dataclasses.replace(TOKENS, temperature=2.0)), "progressive at image projector"),
        ((), "simple at image output, progressive at image projector"),
    ],
)
def test_what_cannot_be_kept_is_said_and_the_rest_is_kept(aligners, named, tmp_path):
    model = llava(EYE, TOKENS)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"holds trained {named}, which the .*To load them, give no.*start afresh without") as told:
        loaded = hf_steer.from_pretrained(tmp_path, steer_config=SteerConfig(aligners=aligners))
    assert told[0].filename == __file__
    assert len(told) == 1
    if aligners:
        assert torch.equal(loaded.hf_steer.aligners[0].router.weight, model.hf_steer.aligners[0].router.weight)
    only = llava(EYE) if aligners else make_encoder_model("llava")
    assert torch.equal(outputs(loaded), outputs(only))


def test_trained_projectors_and_strengths_are_kept_as_aligners_are(tmp_path):
    learned = dataclasses.replace(GAZE, strength="trainable")
    model = llava(EYE, attention=learned, train_projector=True)
    with torch.no_grad():
        model.hf_steer.plan.projectors[0].linear_1.bias.add_(0.5)
    model.save_pretrained(tmp_path)
    same = hf_steer.from_pretrained(tmp_path, steer_config=SteerConfig(attention=learned, aligners=(EYE,), train_projector=True))
    assert torch.equal(outputs(same, look()), outputs(model, look()))
    fewer = SteerConfig(attention=dataclasses.replace(learned, heads={1: (0,)}), aligners=(EYE,))
    with pytest.warns(UserWarning, match="holds trained projector, strengths, which"):
        other = hf_steer.from_pretrained(tmp_path, steer_config=fewer)
    assert torch.equal(other.hf_steer.aligners[0].router.weight, model.hf_steer.aligners[0].router.weight)


@pytest.mark.parametrize("spoil", ["weights", "gone", "stale"])
def test_trained_weights_that_cannot_be_used_are_said(spoil, tmp_path):
    model = llava(EYE)
    model.save_pretrained(tmp_path)
    if spoil == "stale":
        unpatch_model(model).save_pretrained(tmp_path)
    elif spoil == "gone":
        (tmp_path / "hf_steer" / "steer_model.safetensors").unlink()
    else:
        (tmp_path / "hf_steer" / "steer_model.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match=r"holds trained weights \(.*(is stale|cannot be read|has no hf_steer/steer_model)"):
        loaded = hf_steer.from_pretrained(tmp_path, steer_config=SteerConfig(aligners=(EYE,)))
    assert torch.equal(outputs(loaded), outputs(make_encoder_model("llava")))


@pytest.mark.parametrize("configured", [False, True])
def test_a_folder_without_trained_aligners_says_nothing(configured, tmp_path):
    make_encoder_model("llava").save_pretrained(tmp_path)
    if configured:
        SteerConfig(aligners=(EYE,)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_steer.from_pretrained(tmp_path, steer_config=SteerConfig(aligners=(EYE,)))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("strength", [3.0, "trainable"])
def test_a_gaze_can_be_added_to_a_model_with_aligners(named, strength, tmp_path):
    plain = make_encoder_model("llava")
    model = llava(EYE)
    inside = list(model.hf_steer.aligners.parameters())
    gaze = dataclasses.replace(GAZE, strength=strength)
    both = SteerConfig(attention=gaze, aligners=(EYE,))
    before = outputs(model)
    assert patch_model(model, both if named else SteerConfig(attention=gaze)) is model
    assert all(one is other for one, other in zip(inside, model.hf_steer.aligners.parameters(), strict=True))
    status = hf_steer.get_steer_status(model)
    assert (status.heads, status.aligners) == ({1: (0, 2)}, ("simple at image output",))
    assert torch.equal(outputs(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("learned" in name for name in trained) == (strength == "trainable")
    assert all("hf_steer" in name for name in trained)
    stir(model)

    at_once = patch_model(make_encoder_model("llava"), both)
    at_once.load_state_dict(model.state_dict())
    expected = outputs(at_once, look())
    assert not torch.equal(expected, outputs(model))
    assert torch.equal(outputs(model, look()), expected)
    assert torch.equal(outputs(copy.deepcopy(model), look()), expected)
    inputs = make_encoder_inputs("llava")
    with use_saliency(model, look()), use_saliency(at_once, look()):
        options = {"do_sample": False, "max_new_tokens": 3, **inputs}
        assert torch.equal(model.generate(**options), at_once.generate(**options))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(hf_steer.from_pretrained(tmp_path), look()), expected)

    unpatch_model(copied := copy.deepcopy(model))
    for restored in (unpatch_model(model), copied):
        assert torch.equal(outputs(restored), outputs(plain))
        assert list(restored.state_dict()) == list(plain.state_dict())
        assert hooks_of(restored) == hooks_of(plain)
        assert "generate" not in vars(restored)


def test_a_gaze_that_cannot_be_added_leaves_the_model_as_it_was(monkeypatch):
    model = llava(EYE)
    before, hooks = outputs(model), sum(len(module._forward_pre_hooks) for module in model.modules())
    real = hf_steer.patching.edits.AddHook.__enter__
    calls = []

    def fail(self):
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("interrupted")
        return real(self)

    monkeypatch.setattr("hf_steer.patching.edits.AddHook.__enter__", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        patch_model(model, SteerConfig(attention=GAZE))
    monkeypatch.undo()
    assert torch.equal(outputs(model), before)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert hf_steer.get_steer_status(model).config.attention is None
    patch_model(model, SteerConfig(attention=GAZE))
    assert not torch.equal(outputs(model, look()), before)


@pytest.mark.parametrize(
    "config",
    [
        SteerConfig(attention=GAZE, aligners=(TOKENS,)),
        SteerConfig(attention=GAZE, aligners=(EYE,), train_projector=True),
        SteerConfig(aligners=(EYE, TOKENS)),
    ],
)
def test_other_changes_to_a_patched_model_are_refused(config):
    model = llava(EYE)
    before = outputs(model)
    with pytest.raises(PatchError, match=r"patched with another configuration; call hf_steer\.unpatch_model"):
        patch_model(model, config)
    assert torch.equal(outputs(model), before)
    patch_model(model, SteerConfig(attention=GAZE))
    with pytest.raises(PatchError, match="patched with another configuration"):
        patch_model(model, SteerConfig(attention=dataclasses.replace(GAZE, strength=1.0), aligners=(EYE,)))


def test_the_same_aligners_for_another_family_are_not_taken(tmp_path):
    model = patch_model(make_encoder_model("whisper"), align("whisper", "output", "simple"))
    stir(model)
    make_encoder_model("hubert").save_pretrained(tmp_path)
    hf_steer.save_steering(model, tmp_path)
    with pytest.warns(UserWarning, match="holds trained simple at audio output"):
        loaded = hf_steer.from_pretrained(tmp_path, steer_config=align("hubert", "output", "simple"))
    with hf_steer.disable_steering(loaded):
        plain = logits(loaded, make_encoder_inputs("hubert"))
    assert torch.equal(logits(loaded, make_encoder_inputs("hubert")), plain)  # it started fresh


def test_a_large_foreign_file_beside_the_model_is_not_read(tmp_path, monkeypatch):
    """Shapes stand in its first bytes."""
    llava(EYE).save_pretrained(tmp_path)
    path = tmp_path / "hf_steer" / "steer_model.safetensors"
    held = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: torch.zeros(2, *value.shape) for name, value in held.items()}, path)
    edit = json.loads((tmp_path / "steer_config.json").read_text())
    edit["saved"]["weights"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "steer_config.json").write_text(json.dumps(edit))
    read = []
    monkeypatch.setattr(safetensors.torch, "load", lambda content: read.append(content))
    with pytest.warns(UserWarning, match=r"holds trained weights .*shape"):
        hf_steer.from_pretrained(tmp_path, steer_config=SteerConfig(attention=GAZE, aligners=(EYE,)))
    assert not read
