"""Bad files: an error of ours, at once, in little memory, and a model as it was."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from kit.aligning import align, aligned
from kit.tiny_encoders import make_encoder_model
from safetensors.torch import load_file, save, save_file

import hf_steer
from hf_steer import AlignerConfig, AttentionConfig, ConfigError, FileError, SaliencyConfig, SteerConfig, SteerError, patch_model
from hf_steer.config.gate import GateConfig

WEIGHTS = "hf_steer/steer_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model and its aligner, never written to."""
    folder = tmp_path_factory.mktemp("saved")
    aligned("whisper", "output", "simple").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for path in saved.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(saved)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


def refused_at_once(load, folder, message, error=SteerError):
    """At once: counted in calls, not in seconds, which are another number on a busy machine."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    with pytest.raises(error, match=message):
        load(folder)
    sys.setprofile(count)
    try:
        with pytest.raises(error):
            load(folder)
    finally:
        sys.setprofile(None)
    assert calls < 400_000
    tracemalloc.start()
    try:
        with pytest.raises(error):
            load(folder)
        assert tracemalloc.get_traced_memory()[1] < 60 * 2**20
    finally:
        tracemalloc.stop()


def nested(depth):
    return b'{"schema_version": 1, "attention": ' + b"[" * depth + b"]" * depth + b"}"


def config_with(**attention):
    return json.dumps({"schema_version": 1, "attention": attention}).encode()


ALIGNER = {"modality": "audio", "kind": "progressive"}
CONTENTS = {
    "nesting": (nested(100_000), "not valid JSON"),
    "shallow nesting": (nested(900), "attention must be a mapping; got list"),
    "a number of many digits": (b'{"schema_version": ' + b"1" * 900_000 + b"}", "a whole number of 900000 digits"),
    "a number beyond all": (b'{"schema_version": 1, "attention": {"strength": 1e999}}', "1e999 is larger than any number"),
    "a number beyond float32": (
        config_with(strength=1e300), r"strength must be a finite number in float32, at most 3\.4e\+38 in size; got 1e\+300"
    ),
    "a large layer": (config_with(heads={"9" * 30: [0]}), "keys must be layer or head numbers"),
    "a large head": (config_with(heads={"1": [10**25]}), "integers of 32 bits"),
    "NaN": (b'{"schema_version": 1, "attention": {"strength": NaN}}', "NaN is no number of JSON"),
    "infinity": (b'{"schema_version": 1, "attention": {"strength": -Infinity}}', "-Infinity is no number of JSON"),
    "a key twice": (b'{"schema_version": 1, "attention": null, "attention": null}', "the key 'attention' is there twice"),
    "a key twice further in": (b'{"schema_version": 1, "attention": {"heads": {"1": [0], "1": [2]}}}', "'1' is there twice"),
    "many layers": (config_with(heads={str(layer): [0] for layer in range(30_000)}), "; a model has at most 1,024"),
    "many heads": (config_with(heads={"0": list(range(100_000))}), "; a model has at most 1,024"),
    "many unknown keys": (json.dumps({"schema_version": 1, **{f"k{n}": 0 for n in range(30_000)}}).encode(), "has no 'k0'"),
    "many aligners": (
        json.dumps({"schema_version": 1, "aligners": [ALIGNER] * 20_000}).encode(), "20,000 entries; one per modality"
    ),
    "an aligner of nothing": (b'{"schema_version": 1, "aligners": [{}]}', r"aligners\[0\] lacks modality"),
    "many experts": (
        json.dumps({"schema_version": 1, "aligners": [{**ALIGNER, "num_experts": 10**12}]}).encode(), "at most 4,096; got 1000000"
    ),
    "many vectors": (
        json.dumps({"schema_version": 1, "aligners": [{**ALIGNER, "num_experts": 4096, "num_stages": 64}]}).encode(),
        "at most 16,384 steering vectors.*makes 262,144",
    ),
    "phrases that are none": (config_with(gate={"kind": "self_report", "phrases": 5}), "phrases must be non-empty strings"),
    "bytes": (b"\xff\xfe\x00\x01", "not valid JSON"),
    "nothing": (b"", "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_a_bad_configuration_is_an_error_at_once(name, folder):
    content, message = CONTENTS[name]
    (folder / "steer_config.json").write_bytes(content)
    refused_at_once(SteerConfig.from_pretrained, folder, message)
    refused_at_once(hf_steer.from_pretrained, folder, message)


@pytest.mark.parametrize("name", ["steer_config.json", WEIGHTS])
def test_a_gigabyte_is_not_read(name, folder):
    os.truncate(folder / name, 2**30)
    message = "has 1,073,741,824 bytes, a configuration at most" if name == "steer_config.json" else "cannot be read|sha256"
    refused_at_once(hf_steer.from_pretrained, folder, message, FileError)


def without_digest(folder):
    values = json.loads((folder / "steer_config.json").read_text())
    del values["saved"]
    (folder / "steer_config.json").write_text(json.dumps(values))


BAD_WEIGHTS = {
    "NaN": (lambda w: w["router.weight"].fill_(float("nan")), "cannot be used: aligners.0.router.weight holds infinity or NaN"),
    "infinity": (lambda w: w["router.weight"][0].fill_(float("inf")), "holds infinity or NaN"),
    "whole numbers": (lambda w: w.update({"router.weight": w["router.weight"].long()}), "holds int64, needed are real numbers"),
    "truth values": (lambda w: w.update({"router.weight": w["router.weight"].bool()}), "holds bool, needed are real"),
    "another shape": (lambda w: w.update({"router.weight": torch.ones(9, 9)}), r"shape \(9, 9\), needed is"),
    "one more": (lambda w: w.update({"more": torch.ones(1)}), "aligners.0.more is not part of this steering"),
    "one less": (lambda w: w.pop("router.weight"), "router.weight is missing"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_an_error_and_the_model_is_as_it_was(name, folder):
    spoil, message = BAD_WEIGHTS[name]
    weights = {key.removeprefix("aligners.0."): value for key, value in load_file(folder / WEIGHTS).items()}
    spoil(weights)
    save_file({f"aligners.0.{key}": value for key, value in weights.items()}, folder / WEIGHTS)
    without_digest(folder)  # as a file that someone made, and not one that was changed
    refused_at_once(hf_steer.from_pretrained, folder, message, FileError)
    model = aligned("whisper", "output", "simple")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    refused_at_once(lambda place: hf_steer.load_steering(model, place), folder, message, FileError)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00" * 8, (2**62).to_bytes(8, "little") + b"{}", (50).to_bytes(8, "little") + b"[" * 50,
        (100).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'.ljust(100),
        save({"a": torch.ones(2)})[:-1], b"\x80\x04cos\nsystem\n",
    ],
)  # fmt: skip
def test_a_header_that_lies_is_an_error(content, folder):
    (folder / WEIGHTS).write_bytes(content)
    without_digest(folder)
    refused_at_once(hf_steer.from_pretrained, folder, "cannot be read", FileError)


@pytest.mark.parametrize("noted", [True, False])
def test_weights_whose_configuration_lost_its_aligners_are_not_passed_over(noted, folder):
    if not noted:
        without_digest(folder)
    values = json.loads((folder / "steer_config.json").read_text())
    (folder / "steer_config.json").write_text(json.dumps({**values, "aligners": []}))
    message = "its aligners .* were taken out" if noted else "the configuration lost its aligners"
    refused_at_once(hf_steer.from_pretrained, folder, message, FileError)


def test_sizes_that_are_large_and_allowed_take_no_memory_before_they_are_compared(folder):
    values = json.loads((folder / "steer_config.json").read_text())
    values["aligners"][0]["num_experts"] = 4096
    (folder / "steer_config.json").write_text(json.dumps(values))
    refused_at_once(hf_steer.from_pretrained, folder, r"needed is \(4096, ", FileError)


def test_a_base_whose_config_is_bad_is_our_error(folder):
    for content in (b"[1]", nested(100_000), b"\xff\xfe", b'{"model_type": 3}'):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(FileError, match="no model configuration that transformers can read"):
            hf_steer.from_pretrained(folder)


def test_a_base_of_sizes_that_no_tensor_has_is_our_error(folder):
    values = json.loads((folder / "config.json").read_text())
    sizes = values.get("text_config", values)
    sizes["intermediate_size" if "intermediate_size" in sizes else "d_model"] = 10**18
    (folder / "config.json").write_text(json.dumps(values))
    refused_at_once(hf_steer.from_pretrained, folder, r"config\.json asks for a model that cannot be made \(.*overflow", FileError)


@pytest.mark.parametrize(("integer", "floating"), [(np.int64, np.float32), (np.uint8, np.float64), (torch.tensor, torch.tensor)])
def test_scalars_of_numpy_and_torch_are_numbers_in_a_configuration(integer, floating):
    whole, real = integer(3), floating(0.5)
    aligner = AlignerConfig("audio", "layers", num_experts=whole, temperature=real, layers=(whole,), top_k=integer(1))
    assert aligner == AlignerConfig("audio", "layers", num_experts=3, temperature=0.5, layers=(3,), top_k=1)
    saliency = SaliencyConfig(source="decoder_attention", clip=real, last_tokens=whole, blocks=whole, source_heads={whole: [whole]})
    gate = GateConfig(threshold=integer(1), release=real)
    attention = AttentionConfig(heads={whole: (whole,)}, strength={whole: {whole: real}}, saliency=saliency, gate=gate)
    config = SteerConfig(attention=attention, aligners=(aligner,))
    assert SteerConfig.from_dict(json.loads(config.to_json())) == config
    assert type(attention.strength[3][3]) is float
    assert type(attention.heads[3][0]) is int
    assert type(aligner.num_experts) is int
    assert type(aligner.temperature) is type(saliency.clip) is type(gate.release) is float
    assert AttentionConfig(strength=real).strength == 0.5
    assert SaliencyConfig(source="gradient", answer_token=whole).answer_token == 3


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), torch.ones(2), np.ones(1), "3", 1 + 0j, torch.tensor(1j)])
def test_truth_values_and_arrays_are_no_numbers(value):
    for build in (
        lambda: AttentionConfig(strength=value),
        lambda: AlignerConfig("audio", num_experts=value),
        lambda: AttentionConfig(heads={0: (value,)}),
        lambda: SaliencyConfig(clip=value),
    ):
        with pytest.raises(ConfigError, match="must be"):
            build()
    with pytest.raises(ConfigError, match="which holds none"):
        AttentionConfig(strength=torch.tensor(1.0, device="meta"))


def test_an_aligner_too_large_is_refused_before_it_is_made():
    with pytest.raises(ConfigError, match="num_experts must be at most 4,096"):
        align("whisper", "output", "simple", num_experts=10**9)
    patch_model(make_encoder_model("whisper"), align("whisper", "output", "simple", num_experts=4096))
