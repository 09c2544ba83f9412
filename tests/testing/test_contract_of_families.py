"""The contract, as users can check it on their own model: every family × implementation keeps every promise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kit.gazing import gaze, logits, prompt_for, sighted, steer
from kit.tiny import BRIDGED, FAMILIES, IMPLEMENTATIONS, SEEING, UNCOMMON, make_model
from kit.tiny_encoders import ENCODING, LISTENING, make_encoder_inputs, make_encoder_model
from kit.versions import repeats_pictures

import hf_steer
from hf_steer import ConfigError, ContractError, PatchError, Saliency, SaliencyError, SteerConfig, get_steer_status, patch_model
from hf_steer.testing import PROMISES, check_family

DEAF = [family for family in FAMILIES if family not in BRIDGED]
ENCODERS = [family for family in (*ENCODING, "audioflamingo3") if family not in SEEING]
HEARING = (*LISTENING, "audioflamingo3")
CASES = [
    *((family, implementation) for family in (*DEAF, *ENCODERS) for implementation in IMPLEMENTATIONS),
    *((family, implementation) for family, able in UNCOMMON.items() for implementation in able),
]
READERS_ONLY = {"fresh aligners", "learned aligners", "trained"}
"""What a model without an encoder shows nothing of."""
ENCODERS_ONLY = {"switched off", "unpatched", "failed patch", "saved", "copied", *READERS_ONLY}
"""What a model without a language model shows."""


def case_of(family, implementation="sdpa"):
    if family in ENCODERS:
        return make_encoder_model(family, implementation=implementation), make_encoder_inputs(family)
    return make_model(family, implementation), prompt_for(family)


def unshown(family):
    """Promises that this family shows nothing of."""
    if family in ("whisper", "wav2vec2", "hubert"):
        return set(PROMISES) - ENCODERS_ONLY
    if family in HEARING or (family in ENCODING and not repeats_pictures(family)):
        return {"beams"}  # transformers deals several sounds of a row to the wrong beams
    return set() if family in ENCODING else READERS_ONLY


def test_no_family_is_left_out():
    rows = hf_steer.families.FAMILIES.items()
    assert {family for family, _ in CASES} >= {name for name, row in rows if row.composes or row.blocks} | set(ENCODING)


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_every_family_keeps_every_promise(family, implementation):
    model, inputs = case_of(family, implementation)
    report = check_family(model, inputs)
    report.raise_if_failed()
    assert {check.name for check in report.skipped} == unshown(family)
    assert [check.name for check in report.checks] == list(PROMISES)


@sighted
def test_scores_that_the_user_gives_steer_models_with_eyes_as_well(family, implementation):
    model, inputs = case_of(family, implementation)
    check_family(model, inputs, config=steer(family, source=None), only=["oracle", "decoding"]).raise_if_failed()


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_half_precision_keeps_every_promise(family):
    model, inputs = case_of(family)
    own = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    report = check_family(model.bfloat16(), own)
    report.raise_if_failed()
    assert report.dtype == "bfloat16"
    by_name = {check.name: check for check in report.checks}
    assert 0 < by_name["oracle"].error <= by_name["oracle"].bar < 1.5  # logits are about 5


def test_boxes_of_the_user_and_a_scope_are_checked_as_far_as_they_go():
    model, inputs = case_of("qwen2_vl")
    box = Saliency.from_boxes((0, 0, 10, 10), (30, 20))
    check_family(model, inputs, saliency=box).raise_if_failed()
    report = check_family(model, inputs, config=steer("qwen2_vl", queries="generated"))
    report.raise_if_failed()
    assert {check.name: check.why for check in report.skipped} | {"oracle": "", "beams": ""} == {
        "oracle": "", "beams": "", **dict.fromkeys(READERS_ONLY, "no aligners were asked for"),
    }  # fmt: skip


def test_scaled_scores_of_the_user_are_checked_as_they_are_added():
    model, inputs = case_of("qwen2")
    report = check_family(model, inputs, saliency=gaze("qwen2", inputs), config=steer("qwen2", normalize="minmax"))
    report.raise_if_failed()
    assert {check.name for check in report.skipped} == READERS_ONLY


def test_a_model_that_must_not_be_copied_is_checked_without_copies(monkeypatch):
    model, inputs = case_of("qwen2")
    monkeypatch.setattr(type(model), "__deepcopy__", None, raising=False)
    report = check_family(model, inputs, copies=False)
    report.raise_if_failed()
    assert {check.name for check in report.skipped} == {"oracle", "copied", *READERS_ONLY}


def test_without_a_picture_nothing_is_shown_of_aligners():
    inputs = prompt_for("qwen2_vl", rows=[[9], [6]])
    report = check_family(make_model("qwen2_vl"), inputs)
    report.raise_if_failed()
    why = "there is no picture, video or sound in the inputs"
    assert {check.name: check.why for check in report.skipped} == dict.fromkeys(READERS_ONLY, why)


def test_the_model_and_the_random_numbers_are_afterwards_as_before():
    model, inputs = case_of("llava")
    plain = logits(model, inputs)
    model.model.vision_tower.train()
    training = [module.training for module in model.modules()]
    weight = model.get_input_embeddings().weight
    weight.grad = torch.ones_like(weight)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        check_family(model, inputs).raise_if_failed()
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == training
    assert bool((weight.grad == 1).all())
    assert not get_steer_status(model).patched
    assert torch.equal(logits(model.eval(), inputs), plain)


def test_what_cannot_be_checked_is_refused_before_anything_is_touched():
    model, inputs = case_of("qwen2")
    with pytest.raises(ConfigError, match="no promise 'oracles' .did you mean 'oracle'.*it has zero strength, switched off"):
        check_family(model, inputs, only=["oracles"])
    with pytest.raises(ConfigError, match="saliency was given, and there is no gaze"):
        check_family(model, inputs, config=SteerConfig(), saliency=gaze("qwen2", inputs))
    with pytest.raises(SaliencyError, match=r"has shape \(3, 4\); the prompt needs \(3, 24\)"):
        check_family(model, inputs, saliency=Saliency.from_tokens(torch.ones(3, 4)))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with pytest.raises(SaliencyError, match="the inputs hold no input_ids.*or saliency="):
        check_family(model, {"inputs_embeds": embeds})
    patch_model(model, steer("qwen2"))
    with pytest.raises(PatchError, match=r"takes a model that is not patched; call hf_steer.unpatch_model\(model\) first"):
        check_family(model, inputs)
    assert get_steer_status(model).patched


def test_a_report_can_be_read():
    model, inputs = case_of("qwen2")
    report = check_family(model, inputs, only=["trained", "oracle", "zero strength"])
    assert report.passed
    lines = str(report).splitlines()
    assert lines[0].startswith("Qwen2ForCausalLM: qwen2, sdpa, float32 on cpu; torch ")
    assert lines[1] == "  passed   zero strength      with strengths of 0 outputs are bit-equal  error 0, at most 0"
    assert lines[2].startswith("  passed   oracle             every backend agrees with a dense mask in float32  error ")
    assert lines[3].endswith("nothing of the base  (the model has no encoder)")
    assert lines[4].startswith("2 passed, 0 failed, 1 skipped in ")
    nothing = dataclasses.replace(report, checks=report.skipped)
    assert not nothing.passed
    with pytest.raises(ContractError, match="shows nothing on this batch"):
        nothing.raise_if_failed()
