"""The stages of `cover` can fail: each does for a model, or a patch, that is broken on purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kit.broken import is_patched, is_steered, spoil, spoil_where
from kit.damages import differs_in_steps, leaves_another_output

from hf_steer import ConfigError, patch_model
from hf_steer.families import resolve
from hf_steer.testing import coverage
from hf_steer.testing.biased import AttentionCalls
from hf_steer.testing.zoo import tiny_inputs, tiny_model
from hf_steer.testing.zoo.inputs import PADDING, TOKENS


def spoil_wide_passes(model):
    """More rows than the prompts have: beams."""

    def change(self, kwargs, output):
        if is_steered(self) and output.logits.shape[0] > 2:
            output.logits[1::2] *= 0.5

    return spoil(model, change)


def spoil_padded(model):
    def is_padded(self, kwargs):
        mask = kwargs.get("attention_mask")
        return is_steered(self) and mask is not None and not mask[:, :PADDING].all()

    return spoil_where(model, is_padded)


def spoil_static(model):
    def is_static(self, kwargs):
        return is_steered(self) and any("Static" in type(value).__name__ for value in kwargs.values())

    return spoil_where(model, is_static)


BROKEN = [
    ("prefill", lambda model: spoil_where(model, lambda self, kwargs: is_steered(self))),
    ("decode", differs_in_steps),
    ("padded", spoil_padded),
    ("beams", spoil_wide_passes),
    ("static", spoil_static),
    ("undo", leaves_another_output),
    ("unsteered", lambda model: spoil_where(model, lambda self, kwargs: is_patched(self) and not is_steered(self))),
]


@pytest.mark.parametrize(("stage", "damage"), BROKEN, ids=[stage for stage, _ in BROKEN])
def test_a_stage_fails_for_a_model_that_is_broken_there(monkeypatch, stage, damage):
    whole = coverage.cover("qwen2")
    assert whole.covered
    assert all(whole.stages.values()), whole.reason
    monkeypatch.setattr(coverage, "tiny_model", lambda *names, **options: damage(tiny_model(*names, **options)))
    found = coverage.cover("qwen2")
    assert stage in found.failed
    assert f"{stage}: " in found.reason
    assert not found.covered


@pytest.mark.parametrize("family", ["llama", "bloom"])  # through the attention interface, and without it
def test_a_layer_that_is_not_steered_is_seen(monkeypatch, family):
    def patch_one_layer(model, config):
        return patch_model(model, replace(config, attention=replace(config.attention, heads={0: "all"})))

    assert coverage.cover(family).covered
    monkeypatch.setattr(coverage, "patch_model", patch_one_layer)
    assert {"prefill", "decode", "padded", "beams", "static"} <= set(coverage.cover(family).failed)


def test_modules_that_read_the_prompt_and_are_not_called_sites_are_named(monkeypatch):
    def resolve_less(model):
        anatomy = resolve(model)
        return replace(anatomy, layers=anatomy.layers[1:])

    monkeypatch.setattr("hf_steer.families.resolve", resolve_less)
    assert "does not steer model.layers.0.self_attn (1 of 2)" in coverage.cover("llama").reason


def test_a_softmax_is_told_by_the_module_that_calls_it():
    model = tiny_model("gpt_neo")
    with AttentionCalls("softmax") as calls:
        model(**tiny_inputs(model))
    names = {module: name for name, module in model.named_modules()}
    attending = [f"transformer.h.{layer}.attn.attention" for layer in (0, 1)]
    assert [names[module] for module in calls.reading(TOKENS)] == attending
    with AttentionCalls() as calls:
        model(**tiny_inputs(model))
    assert calls.seen == []


def test_a_model_that_is_refused_says_why():
    found = coverage.cover("mamba")
    assert (found.builds, found.interface, found.patched, found.covered) == (True, False, False, False)
    assert found.reason.startswith("refused: a gaze cannot be put into this 'mamba' model")
    assert set(found.stages.values()) == {None}
    fields = ["model_type", "class_name", "kind", "builds", "interface", "patched", *coverage.STAGES, "seconds", "reason"]
    assert list(found.row()) == fields


def test_what_transformers_lacks_is_refused():
    with pytest.raises(ConfigError, match="no model of type 'qwen9000'"):
        coverage.cover("qwen9000")
    with pytest.raises(ConfigError, match="its classes are LlamaForCausalLM"):
        coverage.cover("llama", "LlamaForNothing")
