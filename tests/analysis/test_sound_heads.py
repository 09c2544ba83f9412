"""Sounds in the prompt of an audio language model: from a line of a file to heads, a sweep, a calibration and a picture."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from kit.marked import tone
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperFeatureExtractor, WhisperModel

from hf_steer import AttentionConfig, Saliency, SaliencyConfig, compose, patch_model, unpatch_model
from hf_steer.analysis import calibrate_strength, find_grounding_heads, strength_for_mass, sweep_strength
from hf_steer.analysis.asked import Reader, read_asked
from hf_steer.analysis.heads.jsonl import read_jsonl
from hf_steer.analysis.stretches import see_sound
from hf_steer.embedded import embedded_model_dir

EXAMPLES = embedded_model_dir().parent
SECONDS = 1.0


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """A model of two that have never met, its processor, and a file of 40 lines."""
    torch.manual_seed(0)
    ear = WhisperModel.from_pretrained(EXAMPLES / "tiny_ear").eval()
    mind = AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny_r1_text").eval()
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(EXAMPLES / "tiny_r1_text"),
        "feature_extractor": WhisperFeatureExtractor.from_pretrained(EXAMPLES / "tiny_ear"),
    }
    model, processor = compose(ear, mind, projector="linear", pooling="mean", **parts)
    folder = tmp_path_factory.mktemp("sounds")
    tone(folder / "tone.wav", seconds=SECONDS)
    lines = [
        {"audio": "tone.wav", "seconds": [0.04 * start, 0.04 * start + 0.16], "question": "which number is the first ?",
         "thought": "</think>\n", "answer": str(number % 10)}
        for number, start in zip(range(40), [*range(15)] * 3, strict=False)
    ]  # fmt: skip
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return model.eval(), processor, folder / "examples.jsonl"


def test_seconds_are_a_span_of_the_prompts_sound(heard):
    model, processor, path = heard
    examples = read_jsonl(path, processor, model=model)
    result = find_grounding_heads(model, examples, count=1, rule="slope", null_sets=2)
    assert result.report.measure == "answers"
    assert result.provenance.preserve_mass
    (first, *_) = examples
    ids = first.inputs["input_ids"][0]
    tokens = (ids == model.config.audio_token_id).sum()
    assert tokens > 5
    marked = find_grounding_heads(model, [with_bools(own, model) for own in examples], count=1, rule="selectivity", null_sets=2)
    assert marked.scores["span_mass"] == result.scores["span_mass"]


def with_bools(example, model):
    """The same span as bools over tokens, of a sound of one second whose tokens are of equal length."""
    ((start, end),) = example.span.regions[0].paint.spans
    ids = example.inputs["input_ids"][0]
    places = (ids == model.config.audio_token_id).nonzero().flatten()
    edges = torch.arange(len(places) + 1, dtype=torch.float64) * 0.04
    shares = (torch.minimum(edges[1:], torch.tensor(end)) - torch.maximum(edges[:-1], torch.tensor(start))).clamp(min=0)
    span = torch.zeros(len(ids), dtype=torch.bool)
    span[places[(shares >= 0.5 * shares.max()) & (shares > 0)]] = True
    return dataclasses.replace(example, span=span, answer=None)


def test_sweeps_and_strengths_of_seconds(heard):
    model, processor, path = heard
    pairs = [(own.inputs, own.said) for own in read_asked(path, processor, model=model)[:2]]
    plain = SaliencyConfig(source=None, normalize="none")
    patch_model(model, AttentionConfig(heads={1: "all"}, strength=1.0, saliency=plain, queries="all"))
    try:
        nothing, steered = sweep_strength(model, pairs, (0.0, 4.0), new_tokens=3, decode=processor.batch_decode).rows
        found = calibrate_strength(model, pairs, 0.01, new_tokens=3)
        ids = pairs[0][0]["input_ids"]
        span = torch.zeros(ids.shape)
        span[:, (ids[0] == model.config.audio_token_id).nonzero().flatten()[:4]] = 1
        share = strength_for_mass(model, pairs[0][0], 0.3, saliency=Saliency.from_tokens(span))
    finally:
        unpatch_model(model)
    assert steered.span_mass > nothing.span_mass == steered.unsteered_span_mass
    assert len(steered.answers) == 2
    assert 0 < found.kl_nats <= 0.01
    assert share.missed_share <= 0.05


def test_every_source_of_a_sound_is_drawn_over_its_seconds(heard):
    model, processor, path = heard
    names, found = see_sound(model, Reader(processor, model), path.parent / "tone.wav", "how many ?", sources=None, heads=None,
                             answer=None)  # fmt: skip
    assert set(found) == {"feature_norm", "text_similarity", "decoder_attention", "gradient"}
    assert names[0] == "0.00 s"
    assert all(len(own) == len(names) for own in found.values())
    assert all(float(own.std()) > 0 for own in found.values())
