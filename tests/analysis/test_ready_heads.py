"""Lists of heads by name: they are what `hf-steer heads` writes, say where they come from, and refuse another model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from kit.crossing import make_crossing_model
from kit.marked import sound_examples, text_examples
from kit.tiny import make_model

import hf_steer
from hf_steer import AttentionConfig, ConfigError, FileError
from hf_steer.analysis import find_grounding_heads
from hf_steer.analysis.heads import head_lists, ready
from hf_steer.analysis.heads.origin import config_hash, weights_sha256

PAGES = Path(__file__).parents[2] / "docs"


@pytest.fixture
def found(tmp_path, monkeypatch):
    monkeypatch.setattr(ready, "LISTS", tmp_path)
    result = find_grounding_heads(make_model("llama"), text_examples(40), rule="slope", count=3, null_sets=2, seed=5)
    result.save(tmp_path / "tiny-llama.json")
    return result


def test_a_list_loads_by_name_and_by_path(found, tmp_path):
    assert head_lists() == ("tiny-llama",)
    for name in ("tiny-llama", tmp_path / "tiny-llama.json"):
        for model in (None, make_model("llama")):
            assert hf_steer.load_heads(name, model) == found.heads
    assert AttentionConfig(heads=hf_steer.load_heads("tiny-llama")).heads == found.heads
    again = ready.read_list("tiny-llama")
    assert again == found
    assert again.provenance == found.provenance


def test_where_it_comes_from_is_in_it(found):
    origin = found.provenance
    assert (origin.model_type, origin.layers, origin.heads, origin.attends, origin.seed) == ("llama", 3, 4, "self", 5)
    assert origin.hf_steer == hf_steer.__version__
    assert origin.config_hash == config_hash(make_model("llama").config) != config_hash(make_model("qwen2").config)
    assert len(origin.examples_hash) == 16


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make_model("qwen2"), "'tiny-llama' were found on .*: model type llama, here qwen2. Heads of one model mean"),
        (lambda: make_model("llama", num_hidden_layers=2), "layers 3, here 2"),
        (lambda: make_model("llama", num_attention_heads=8), "heads 4, here 8"),
    ],
)
def test_a_list_for_another_model_is_refused(model, message, found):
    with pytest.raises(ConfigError, match=message):
        hf_steer.load_heads("tiny-llama", model())


def test_a_list_of_heads_across_is_for_such_heads(tmp_path, monkeypatch):
    monkeypatch.setattr(ready, "LISTS", tmp_path)
    model = make_crossing_model("whisper")
    result = find_grounding_heads(model, sound_examples(40, answer=False), attends="cross", count=2, null_sets=2)
    result.save(tmp_path / "ear.json")
    assert hf_steer.load_heads("ear", model) == result.heads
    with pytest.raises(hf_steer.PatchError, match="has no heads that look at what an encoder hands on"):
        hf_steer.load_heads("ear", make_model("llama"))


def test_what_is_no_list_is_refused(found, tmp_path):
    with pytest.raises(FileError, match=r"there is no list of heads 'nothing' and no such file.*Lists: tiny-llama"):
        hf_steer.load_heads("nothing")
    (tmp_path / "other.json").write_text('{"heads": {"1": [0]}}')
    with pytest.raises(FileError, match="other.json is no list of heads: a result: missing"):
        hf_steer.load_heads("other")
    dataclasses.replace(found, provenance=None).save(tmp_path / "old.json")
    assert hf_steer.load_heads("old") == found.heads
    with pytest.raises(ConfigError, match="'old' does not say on which model its heads were found"):
        hf_steer.load_heads("old", make_model("llama"))


def test_the_lists_of_the_package_say_all_that_is_asked_of_them():
    for name in head_lists():
        result = ready.read_list(name)
        origin = result.provenance
        assert result.found, result.verdict
        assert result.report.examples >= 20
        assert origin.command.startswith("hf-steer heads --model ")
        assert len(origin.weights_sha256) == 64
        assert "/" not in origin.model + origin.command.replace("hf-steer", "")
        assert json.loads((ready.LISTS / f"{name}.json").read_text())["verdict"] == "found"
        report, page = result.report, (PAGES / "heads-strength-when.md").read_text()
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        for share in (f"{report.chosen}", f"unsteered {report.baseline:.2f}", f"{report.examples} lists"):
            assert share in row
        for sets in (report.same_layers, report.all_heads):
            assert f"{sum(sets) / len(sets):.2f}" in row
        assert all(word in row for word in origin.command.replace("--seed 0 ", "").split())


def test_the_slope_foretells_the_effect_as_the_page_says():
    scores = {name: np.array(own, dtype=float) for name, own in ready.read_list("smollm2-135m-instruct").scores.items()}
    tried = ~np.isnan(scores["effect"])
    slope, selectivity = (np.corrcoef(scores[name][tried], scores["effect"][tried])[0, 1] for name in ("slope", "selectivity"))
    said = f"over the {tried.sum()} heads of SmolLM2-135M-Instruct that were steered for the list below, the correlation with the"
    said = f"{said} effect is {slope:.2f} for the slope and {selectivity:.2f} for the selectivity"
    assert said in " ".join((PAGES / "heads-strength-when.md").read_text().split())


def test_weights_are_known_by_their_files(tmp_path):
    assert weights_sha256(tmp_path) is None is weights_sha256(tmp_path / "nowhere")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    first = weights_sha256(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"two")
    assert first != weights_sha256(tmp_path)
