"""The checks can fail: for each promise, a model that is broken on purpose, of which the check of that promise says so."""

from __future__ import annotations

import threading

import pytest
import torch
from kit.broken import is_patched, is_steered, reclass, spoil, spoil_where, swallow
from kit.gazing import prompt_for
from kit.tiny import make_model
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model
from kit.versions import cache_of

from hf_steer import ContractError, PatchError, SaliencyError, get_steer_status
from hf_steer.testing import PROMISES, check_family

PROMPT = prompt_for("qwen2")["input_ids"]


def switched_off(model):
    return spoil_where(model, lambda self, kwargs: not get_steer_status(self).enabled)


def nothing_asked(model):
    def change(self, kwargs, output):
        if is_patched(self) and not is_steered(self):
            raise RuntimeError("nothing says where to look")

    return spoil(model, change)


def leaves_an_attribute(model):
    def change(self, kwargs, output):
        if is_patched(self):
            self.left_behind = True

    return spoil(model, change)


def leaves_a_hook(model):
    def change(self, kwargs, output):
        if is_patched(self):
            self.lm_head.register_forward_hook(lambda *_: None)

    return spoil(model, change)


def leaves_other_weights(model):
    def change(self, kwargs, output):
        if is_patched(self):
            with torch.no_grad():
                self.lm_head.weight += 0.1

    return spoil(model, change)


def leaves_another_output(model):
    patched = []

    def change(self, kwargs, output):
        patched.append(is_patched(self))
        if any(patched) and not patched[-1]:
            output.logits = output.logits + 1

    return spoil(model, change)


def keeps_what_is_deleted(model):
    def __delattr__(self, name):
        if name != "generate":
            type(self).__mro__[1].__delattr__(self, name)

    reclass(model, __delattr__=__delattr__)
    return model


def looks_nowhere(model):
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.self_attn.o_proj.weight.zero_()
    return model


def leaks(model):
    def change(self, kwargs, output):
        if is_steered(self):
            output.logits[:, :-1] += 0.01 * kwargs["input_ids"][:, -1:, None]

    return spoil(model, change)


def forgets_beams(model):
    def change(self, kwargs, output):
        if is_steered(self) and kwargs["input_ids"].shape[0] > len(PROMPT):
            output.logits = output.logits + torch.arange(96) * 0.01

    return spoil(model, change)


def differs_in_steps(model):
    def change(self, kwargs, output):
        if is_steered(self) and output.logits.shape[1] == 1 and kwargs["input_ids"].shape[1] == 1:
            output.logits = output.logits + 1

    return spoil(model, change)


def remembers_its_first_steering(model):
    seen = []

    def is_another(self, kwargs):
        seen.append(self.hf_steer)
        return self.hf_steer is not seen[0]

    return spoil_where(model, is_another)


def knows_its_copies(model):
    return spoil_where(model, lambda self, kwargs: self is not model)


def goes_on_looking(model):
    last = []

    def change(self, kwargs, output):
        if is_steered(self):
            last[:] = [output.logits]
        elif is_patched(self) and last:
            output.logits = last[0]

    return spoil(model, change)


def follows_the_buffer(model):
    """As if a statement were the caller's buffer: what steers alike at first steers otherwise the second time."""
    passes = []

    def is_second(self, kwargs):
        passes.append(is_steered(self))
        return sum(passes) == 2

    return spoil_where(model, is_second)


def keeps_caches(model):
    kept = []

    def change(self, kwargs, output):
        if is_steered(self):
            kept.append(cache_of(output))

    return spoil(model, change)


def answers_always_the_same(model):
    first = []

    def change(self, kwargs, output):
        first.append(output.logits)
        output.logits = first[0]

    return spoil(model, change)


def trains_itself(model):
    def change(self, kwargs, output):
        if is_patched(self):
            self.lm_head.weight.requires_grad_(True)

    return spoil(model, change)


def cuts_gradients(model):
    def change(self, kwargs, output):
        output.logits = output.logits.detach().requires_grad_(output.logits.requires_grad)

    return spoil(model, change)


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
