"""The checks can fail: for each promise, a model that is broken on purpose, of which the check of that promise says so."""

from __future__ import annotations

import threading

import pytest
from kit.broken import is_steered, spoil, spoil_where, swallow
from kit.damages import (
    PROMPT,
    answers_always_the_same,
    cuts_gradients,
    differs_in_steps,
    follows_the_buffer,
    forgets_beams,
    goes_on_looking,
    keeps_caches,
    keeps_what_is_deleted,
    knows_its_copies,
    leaks,
    leaves_a_hook,
    leaves_an_attribute,
    leaves_another_output,
    leaves_other_weights,
    looks_nowhere,
    nothing_asked,
    remembers_its_first_steering,
    switched_off,
    trains_itself,
)
from kit.gazing import prompt_for
from kit.tiny import make_model
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model

from hf_steer import ContractError, PatchError, SaliencyError
from hf_steer.testing import PROMISES, check_family

BROKEN = [
    ("zero strength", "qwen2", lambda model: spoil_where(model, lambda self, kwargs: not is_steered(self))),
    ("switched off", "qwen2", switched_off),
    ("nothing asked", "qwen2", nothing_asked),
    ("unpatched", "qwen2", leaves_an_attribute),
    ("unpatched", "qwen2", leaves_a_hook),
    ("unpatched", "qwen2", leaves_other_weights),
    ("unpatched", "qwen2", leaves_another_output),
    ("failed patch", "qwen2", keeps_what_is_deleted),
    ("steered", "qwen2", looks_nowhere),
    ("oracle", "qwen2", lambda model: spoil_where(model, lambda self, kwargs: is_steered(self))),
    ("applied", "qwen2", lambda model: swallow(model, PatchError)),
    ("partial match", "qwen2", lambda model: swallow(model, SaliencyError)),
    ("padding", "qwen2", lambda model: spoil_where(model, lambda self, kwargs: kwargs["input_ids"].shape[1] > PROMPT.shape[1])),
    ("no leak", "qwen2", leaks),
    ("decoding", "qwen2", differs_in_steps),
    ("beams", "qwen2", forgets_beams),
    ("threads", "qwen2", lambda model: spoil_where(model, lambda *_: threading.current_thread() is not threading.main_thread())),
    ("saved", "qwen2", remembers_its_first_steering),
    ("copied", "qwen2", knows_its_copies),
    ("statement", "qwen2", goes_on_looking),
    ("statement", "qwen2", follows_the_buffer),
    ("freed", "qwen2", keeps_caches),
    ("fresh aligners", "llava", lambda model: spoil_where(model, lambda *_: True)),
    ("learned aligners", "llava", answers_always_the_same),
    ("trained", "llava", trains_itself),
    ("trained", "llava", cuts_gradients),
]


def make(family):
    if family == "llava":
        return make_encoder_model(family), make_encoder_inputs(family)
    return make_model(family), prompt_for(family)


def test_every_promise_is_broken_by_some_model():
    assert {name for name, _, _ in BROKEN} == set(PROMISES)


@pytest.mark.parametrize(("name", "family", "damage"), BROKEN)
def test_a_broken_promise_is_found(name, family, damage):
    model, inputs = make(family)
    report = check_family(damage(model), inputs, only=[name])
    (check,) = report.checks
    assert check.passed is False, str(report)
    assert not report.passed
    with pytest.raises(ContractError, match=rf"breaks 1 of 1 promises:\n  FAILED   {name} "):
        report.raise_if_failed()


def test_all_broken_promises_are_told_at_once():
    model, inputs = make("qwen2")
    spoil_where(model, lambda self, kwargs: is_steered(self) and kwargs["input_ids"].shape[1] == 1)
    report = check_family(model, inputs, only=["zero strength", "oracle", "decoding", "beams"])
    assert [check.name for check in report.failed] == ["decoding", "beams"]
    told = r"(?s)breaks 2 of 4 promises:\n  FAILED   decoding .*\n  FAILED   beams .*please report"
    with pytest.raises(ContractError, match=told):
        report.raise_if_failed()
    assert report.failed[0].error > report.failed[0].bar > 0


def test_a_fault_of_the_model_alone_is_not_laid_to_the_steering():
    """Unpatched it already gives something else when padding comes before the prompt."""
    model, inputs = make("qwen2")

    def change(self, kwargs, output):
        if kwargs["input_ids"].shape[1] > PROMPT.shape[1]:
            output.logits = output.logits + 1

    report = check_family(spoil(model, change), inputs, only=["padding", "oracle"])
    report.raise_if_failed()
    (check,) = report.skipped
    assert check.name == "padding"
    assert check.why == "the unpatched model's own results in these two ways are 1 apart"


def test_a_check_that_leaves_the_model_changed_has_failed():
    model, inputs = make("qwen2")
    report = check_family(leaves_an_attribute(model), inputs, only=["oracle"])
    assert report.failed[0].why == "afterwards the model was not as before: the model: attributes"
