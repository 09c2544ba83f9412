"""Models that keep one promise of the contract less, each on purpose; `PROMPT` is the one that some of them know."""

from __future__ import annotations

import torch
from kit.broken import is_patched, is_steered, reclass, spoil, spoil_where
from kit.gazing import prompt_for
from kit.versions import cache_of

from hf_steer import get_steer_status

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
