"""A model out of a GGUF file: loaded, steered, saved like any other; one whose weights stay packed saves its steering."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from kit.gguf_files import FILE, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_steer
from hf_steer import AttentionConfig, FileError, GateConfig, Saliency, SaliencyConfig
from hf_steer.ground import gguf as ground_gguf

pytest.importorskip("gguf")

GAZE = AttentionConfig(
    queries="all", heads={1: (0, 3)}, strength=3.0, saliency=SaliencyConfig(source=None, normalize="none")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def words(folder):
    return AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def logits_of(model, words, said="that"):
    inputs = words("hold that thought", return_tensors="pt")
    saliency = None if said is None else Saliency.from_text(said, words, inputs["input_ids"])
    with torch.no_grad():
        return model(**inputs, **({} if saliency is None else {"saliency": saliency})).logits


def test_a_gguf_file_is_loaded_with_plain_weights_and_steered(folder, words):
    plain = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE)
    model = hf_steer.from_pretrained(folder, gguf_file=FILE, steer_config=GAZE)
    before = logits_of(plain, words, None)
    assert torch.equal(logits_of(model, words, None), before)
    steered = logits_of(model, words)
    assert (steered - before).abs().max() > 1e-3
    hf_steer.patch_model(plain, GAZE)
    assert torch.equal(logits_of(plain, words), steered)


def test_it_is_saved_whole_and_loads_without_the_gguf_file(folder, words, tmp_path):
    model = hf_steer.from_pretrained(folder, gguf_file=FILE, steer_config=GAZE)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(hf_steer.from_pretrained(tmp_path), words), logits_of(model, words))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), words, None), logits_of(model, words, None))


def test_its_steering_may_lie_beside_the_gguf_file_or_elsewhere(folder, words, tmp_path):
    beside = write_gguf(tmp_path)
    model = hf_steer.from_pretrained(beside, gguf_file=FILE, steer_config=GAZE)
    hf_steer.save_steering(model, beside)
    again = hf_steer.from_pretrained(beside, gguf_file=FILE)
    other = hf_steer.from_pretrained(folder, gguf_file=FILE, steer_config=beside)
    for loaded in (again, other):
        assert torch.equal(logits_of(loaded, words), logits_of(model, words))


def test_tags_and_phrases_are_read_by_the_files_own_tokenizer_or_by_the_one_that_is_given(folder, words):
    gated = AttentionConfig(
        heads={1: (0,)}, gate=GateConfig(kind="self_report", phrases=("that",)), saliency=SaliencyConfig(source=None)
    )
    patterns = [
        hf_steer.patching.scopes.steering_of(
            hf_steer.from_pretrained(folder, gguf_file=FILE, steer_config=gated, tokenizer=given)
        ).plan.patterns
        for given in (None, words)
    ]
    assert patterns[0] == patterns[1]
    assert patterns[0].phrases


def packed_model(folder):
    """As transformers by itself loads it: weights that it counts as packed, where it can."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE)
    if not hasattr(transformers, "GgufConfig"):
        pytest.skip("this release always unpacks GGUF files")
    return model


LEARNED = dataclasses.replace(GAZE, strength="trainable")


@pytest.mark.parametrize(("gaze", "files"), [(GAZE, []), (LEARNED, ["hf_steer"])], ids=["given", "learned"])
def test_packed_weights_are_not_saved_and_the_steering_is(gaze, files, folder, words, tmp_path):
    model = hf_steer.patch_model(packed_model(folder), gaze)
    for value in hf_steer.patching.scopes.steering_of(model).parameters():
        value.data.fill_(2.0)
    with pytest.warns(UserWarning, match=rf"weights were not: they are packed by gguf.*gguf_file='{FILE}', steer_config=") as said:
        model.save_pretrained(tmp_path / "out")
    assert len(said) == 1
    assert __file__ == said[0].filename
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*files, "steer_config.json"]
    again = hf_steer.from_pretrained(folder, gguf_file=FILE, steer_config=tmp_path / "out")
    assert torch.equal(logits_of(again, words), logits_of(model, words))
    with pytest.raises(FileError, match="is a steering"):
        hf_steer.from_pretrained(tmp_path / "out")
    hf_steer.unpatch_model(model)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "plain")


def test_what_the_caller_says_of_the_weights_stands(folder):
    config_class = getattr(transformers, "GgufConfig", None)
    if config_class is None:
        pytest.skip("this release always unpacks GGUF files")
    asked = config_class(dequantize=True)
    assert ground_gguf.plain_weights(FILE, {"quantization_config": asked})["quantization_config"] is asked
    assert ground_gguf.plain_weights(FILE, {})["quantization_config"].dequantize


def test_without_the_package_and_without_the_file_it_is_said(folder, monkeypatch, tmp_path):
    with pytest.raises(FileError, match=r"holds no model configuration"):
        hf_steer.from_pretrained(folder, gguf_file="other.gguf", steer_config=GAZE)
    (tmp_path / FILE).write_bytes(b"no such thing" * 100)
    with pytest.raises(FileError, match=r"holds no model configuration"):
        hf_steer.from_pretrained(tmp_path, gguf_file=FILE, steer_config=GAZE)
    monkeypatch.setattr(ground_gguf, "is_gguf_available", lambda: False)
    with pytest.raises(FileError, match=r"pip install 'hf-steer\[real\]'"):
        hf_steer.from_pretrained(folder, gguf_file=FILE, steer_config=GAZE)
