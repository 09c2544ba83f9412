"""What is verified can fail: for each promise a model, or a part of hf_steer, that is broken on purpose, patched already or not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kit.broken import is_patched, is_steered, spoil, spoil_where, swallow
from kit.damages import (
    PROMPT,
    differs_in_steps,
    forgets_beams,
    leaks,
    leaves_a_hook,
    leaves_an_attribute,
    leaves_another_output,
    leaves_other_weights,
    looks_nowhere,
    remembers_its_first_steering,
)
from kit.gazing import prompt_for, steer
from kit.plugins import tables_as_they_were
from kit.tiny import make_model
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model

import hf_steer
from hf_steer import Backend, ContractError, PatchError, SteerConfig, patch_model, verify
from hf_steer.patching import lifted
from hf_steer.patching.gaze.biases import BiasMaker
from hf_steer.registry import BACKENDS
from hf_steer.values import HeadBias
from hf_steer.verify import PROMISES


@pytest.fixture(autouse=True)
def _own_tables():
    with tables_as_they_were():
        yield


def speaks_at_zero(model):
    return spoil_where(model, lambda self, kwargs: "use_strength" in str(hf_steer.get_steer_status(self).why))


def minds_padding(model):
    def is_longer(self, kwargs):
        return is_steered(self) and not bool(kwargs["attention_mask"][:, 0].any())

    return spoil_where(model, is_longer)


ANY = [
    ("identity", speaks_at_zero),
    ("receipt", looks_nowhere),
    ("receipt", lambda model: swallow(model, PatchError)),
    ("no leak", leaks),
    ("padding", minds_padding),
    ("decoding", differs_in_steps),
    ("beams", forgets_beams),
    ("undone", leaves_another_output),
]
FRESH = [
    ("saved", remembers_its_first_steering),
    ("undone", leaves_an_attribute),
    ("undone", leaves_a_hook),
    ("undone", leaves_other_weights),
]
"""What only a patch that comes and goes can show."""
ELSEWHERE = {"aligners", "backend"}
"""Broken further down."""


def test_every_promise_is_broken_by_something():
    assert {name for name, _ in (*ANY, *FRESH)} | ELSEWHERE == set(PROMISES)


def broken(report):
    assert not report.holds
    with pytest.raises(ContractError, match="Do not rely on"):
        report.raise_if_broken()
    (check,) = report.broken
    return check


@pytest.mark.parametrize(("name", "damage"), [*ANY, *FRESH])
def test_a_broken_promise_is_found(name, damage):
    report = verify(damage(make_model("qwen2")), prompt_for("qwen2"), only=[name])
    assert broken(report).name == name, str(report)


@pytest.mark.parametrize(("name", "damage"), ANY)
def test_a_broken_promise_of_a_patched_model_is_found(name, damage):
    model = patch_model(make_model("qwen2"), steer("qwen2", normalize="none"))
    report = verify(damage(model), prompt_for("qwen2"), only=[name])
    assert broken(report).name == name, str(report)
    assert report.verdict.startswith("Do not rely on the patch of this model: 1 of 1 promises are broken")


def doubled(call, bias):
    return BACKENDS["mask"].attend(call, HeadBias(2 * bias.query, bias.key))


def opened(call, bias):
    """As most published hooks do: a float added to a bool mask lets the future in."""
    mask = call.mask.to(call.query.dtype) + (bias.query * bias.key[:, None, None, :, 0])
    return call.run(call.query, call.key, call.value, mask, causal=False)


def rounded(call, bias):
    """Too coarsely."""
    return BACKENDS["mask"].attend(call, HeadBias((64 * bias.query).round() / 64, bias.key))


def only_in_prompts(call, bias):
    """In steps the bias is lost."""
    if call.queries > 1:
        return BACKENDS["mask"].attend(call, bias)
    return call.run(call.query, call.key, call.value, call.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attend", [doubled, opened, rounded, only_in_prompts])
def test_a_backend_that_computes_something_else_is_found_in_its_heads(attend, dtype):
    if attend is rounded and dtype is torch.bfloat16:
        pytest.skip("which is as coarse itself")
    hf_steer.register_backend(attend.__name__, Backend(attend=attend))
    config = steer("qwen2", backend=attend.__name__, strength={1: {0: 1.505, 3: -2.703}}, heads={1: (0, 3)}, normalize="none")
    model = make_model("qwen2").to(dtype)
    check = broken(verify(model, prompt_for("qwen2"), config=config, only=["backend"]))
    assert check.error > check.bar > 0
    mask = dataclasses.replace(config.attention, backend="mask")
    assert verify(model, prompt_for("qwen2"), config=mask, only=["backend"]).holds


def without_a_layer(self):
    return dict(list(EVERY(self).items())[1:])


def in_other_heads(self):
    return {layer: HeadBias(bias.query.flip(1), bias.key) for layer, bias in EVERY(self).items()}


def half_as_strong(self):
    return {layer: HeadBias(bias.query / 2, bias.key) for layer, bias in EVERY(self).items()}


EVERY = BiasMaker.every


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (without_a_layer, r"layers [1]: named heads (0, 1), steered None"),
        (in_other_heads, r"layers [1]: named heads (0, 1), steered (2, 3)"),
        (half_as_strong, "what was added to the logits is not λ times the score that was said"),
    ],
)
def test_a_bias_that_goes_astray_is_found_in_the_receipt(make, why, monkeypatch):
    monkeypatch.setattr(BiasMaker, "every", make)
    config = steer("qwen2", heads={1: (0, 1), 2: "all"}, normalize="none")
    assert broken(verify(make_model("qwen2"), prompt_for("qwen2"), config=config, only=["receipt"])).why == why


def test_fresh_aligners_that_change_something_are_found():
    def is_aligned(self, kwargs):
        return is_patched(self) and bool(hf_steer.get_steer_status(self).aligners)

    model = spoil_where(make_encoder_model("llava"), is_aligned)
    assert broken(verify(model, make_encoder_inputs("llava"), only=["aligners"])).name == "aligners"


def test_a_patch_that_does_not_come_off_is_found(monkeypatch):
    class Stuck(lifted.ExitStack):
        def close(self):
            """Nothing is taken back."""

    model = patch_model(make_model("qwen2"), steer("qwen2"))
    steering = model.hf_steer
    steering.undo = Stuck()
    monkeypatch.setattr(type(steering), "edits", lambda self: iter(()))
    check = broken(verify(model, prompt_for("qwen2"), only=["undone"]))
    assert check.why.startswith("left behind: submodule hf_steer, attribute save_pretrained, attribute generate, ")


def test_weights_that_are_not_saved_are_found(monkeypatch):
    from hf_steer.patching import handle

    model, inputs = make_encoder_model("llava"), make_encoder_inputs("llava")
    real = handle.gather_weights
    monkeypatch.setattr(handle, "gather_weights", lambda *args: {name: torch.zeros_like(own) for name, own in real(*args).items()})
    aligner = hf_steer.AlignerConfig(modality="image", placement="output", num_experts=2)
    config = SteerConfig(attention=steer("llava").attention, aligners=(aligner,))
    assert broken(verify(model, inputs, config=config, only=["saved"])).name == "saved"


def test_what_the_model_itself_cannot_do_is_not_laid_to_the_steering():
    model = make_model("qwen2")

    def change(self, kwargs, output):
        if kwargs["input_ids"].shape[0] > len(PROMPT):
            raise RuntimeError("no beams here")

    report = verify(spoil(model, change), prompt_for("qwen2"))
    assert report.holds
    whys = {check.name: check.why for check in report.unshown}
    assert whys["beams"] == "the unpatched model itself fails here (RuntimeError: no beams here)"


def test_a_model_that_never_computes_the_same_twice_is_not_called_broken():
    model = make_model("qwen2")

    def change(self, kwargs, output):
        output.logits += 1e-3 * torch.randn_like(output.logits)

    report = verify(spoil(model, change), prompt_for("qwen2"), only=["identity", "undone"])
    assert not report.broken
    assert "gives something else each time" in report.unshown[0].why
