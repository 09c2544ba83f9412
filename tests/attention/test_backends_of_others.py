"""Backends that somebody else has added: taken by name alone, and given way where they cannot."""

from __future__ import annotations

import pytest
import torch
from kit.asking import look, prompt, steered
from kit.plugins import tables_as_they_were

import hf_steer
from hf_steer import Backend
from hf_steer.registry import BACKENDS


@pytest.fixture(autouse=True)
def _own_tables():
    with tables_as_they_were():
        yield


def counted(calls):
    def attend(call, bias):
        calls.append(call.layer)
        return BACKENDS["mask"].attend(call, bias)

    return attend


@torch.no_grad()
def logits(backend):
    inputs = prompt()
    model = steered(backend=backend)
    with hf_steer.use_saliency(model, look(inputs)):
        return model(**inputs).logits


def test_a_backend_is_taken_by_its_name_and_never_chosen_for_anybody():
    calls = []
    hf_steer.register_backend("counting", Backend(attend=counted(calls)))
    plain = logits("mask")
    logits("auto")
    assert not calls
    assert logits("counting").equal(plain)
    assert calls == [0, 1, 2]


@pytest.mark.parametrize(
    ("more", "why"),
    [({"over": ("eager",)}, "it does not know the masks of 'sdpa'"), ({"refuse": lambda call: "it is Monday"}, "it is Monday")],
)
def test_a_backend_that_cannot_gives_way_and_says_why(more, why):
    calls = []
    name = f"shy_{'over' if 'over' in more else 'refusing'}"
    hf_steer.register_backend(name, Backend(attend=counted(calls), **more))
    with pytest.warns(UserWarning, match=f"backend '{name}' gives way to '.*', with the same result: {why}"):
        found = logits(name)
    torch.testing.assert_close(found, logits("mask"), rtol=1e-4, atol=2e-5)
    assert not calls
