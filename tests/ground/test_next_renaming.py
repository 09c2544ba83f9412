"""A release renames the cache once more, as 5.24 did: told by its type, it is found, and every step is steered."""

from __future__ import annotations

import inspect
from typing import Optional

import pytest
import torch
from kit.asking import cache_for, look, looking, prompt, steer
from kit.broken import declared, reclass, renamed
from kit.tiny import make_model
from kit.versions import CACHE
from transformers import Cache, DynamicCache

import hf_steer
from hf_steer import disable_steering, patch_model

NEW = "kv"
STEPS = 5
ANNOTATIONS = {"type": Cache | None, "text": "Cache | None", "optional": Optional[Cache], "alone": Cache}  # noqa: UP045


def rename_in_decoder(model, annotation):
    """The decoder's cache is `kv`, under which the rest of its model hands it on."""
    decoder = model.get_decoder()
    kind = type(decoder)

    def call(self, *args, **kwargs):
        return kind.__call__(self, *args, **{NEW if name == CACHE else name: value for name, value in kwargs.items()})

    reclass(decoder, forward=declared(kind, renamed(CACHE, NEW, annotation=annotation)), __call__=call)


def rename_in_root(model, annotation):
    """The model's own, too; `generate` hands it on under the new name."""
    kind = type(model)

    def prepare(self, *args, **kwargs):
        found = kind.prepare_inputs_for_generation(self, *args, **kwargs)
        return {NEW if name == CACHE else name: value for name, value in found.items()}

    forward = declared(kind, renamed(CACHE, NEW, annotation=annotation))
    reclass(model, forward=forward, prepare_inputs_for_generation=prepare)


RENAMINGS = {"decoder": [rename_in_decoder], "root": [rename_in_root], "both": [rename_in_decoder, rename_in_root]}


def renamed_model(where, annotation="Cache | None", family="qwen2"):
    model = make_model(family)
    for rename in RENAMINGS[where]:
        rename(model, annotation)
    return model


def each_step(model, inputs, statement=None, **kwargs):
    """Tokens, and the logits of every step."""
    with looking(model, statement):
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
        )
    return out.sequences, torch.stack(out.logits)


def test_the_new_name_is_what_the_decoder_takes_and_gets():
    model = renamed_model("both")
    for module in (model, model.get_decoder()):
        names = inspect.signature(type(module).forward).parameters
        assert NEW in names
        assert CACHE not in names
    got = []
    model.get_decoder().register_forward_pre_hook(lambda module, args, kwargs: got.append(kwargs), with_kwargs=True)
    each_step(model, prompt())
    assert len(got) == STEPS
    assert all(isinstance(kwargs[NEW], DynamicCache) and CACHE not in kwargs for kwargs in got)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
@pytest.mark.parametrize("where", RENAMINGS)
def test_a_renamed_cache_is_steered_in_the_prompt_and_in_every_step(where, family):
    inputs = prompt(family)
    said = None if family == "qwen2_vl" else look(inputs)
    usual = patch_model(make_model(family), steer(family))
    model = patch_model(renamed_model(where, family=family), steer(family))
    expected, found = each_step(usual, inputs, said), each_step(model, inputs, said)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    with disable_steering(usual):
        plain = each_step(usual, inputs)[1]
    assert all(not step.allclose(other, atol=1e-3) for step, other in zip(expected[1], plain, strict=True))


@pytest.mark.parametrize("annotation", ANNOTATIONS)
def test_each_step_is_steered_however_the_type_is_written(annotation):
    inputs = prompt()
    said = look(inputs)
    model = patch_model(renamed_model("both", ANNOTATIONS[annotation]), steer())
    expected = each_step(patch_model(make_model("qwen2"), steer()), inputs, said)[1]
    with hf_steer.trace_steering(model) as trace:
        assert torch.equal(each_step(model, inputs, said)[1], expected)
    assert [step.strength > 0 for step in trace.steps()] == [True] * STEPS


def test_beams_and_batches_move_under_the_new_name():
    inputs = prompt(rows=2)
    said = look(inputs)
    usual, model = patch_model(make_model("qwen2"), steer()), patch_model(renamed_model("both"), steer())
    expected = each_step(usual, inputs, said, num_beams=3)[0]
    assert torch.equal(each_step(model, inputs, said, num_beams=3)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("said_again", [True, False])
def test_a_loop_of_the_users_own_is_steered_in_its_prompt_and_its_steps(said_again):
    inputs = prompt()
    said = look(inputs)

    def loop(model, name, statement):
        cache = {name: cache_for(model)}
        with looking(model, statement):
            first = model(**inputs, **cache).logits[:, -1:]
        with looking(model, statement if said_again else None):
            return [first, *(model(input_ids=torch.tensor([[token]]), **cache).logits for token in (5, 6, 7))]

    model = patch_model(renamed_model("both"), steer())
    found, expected = loop(model, NEW, said), loop(patch_model(make_model("qwen2"), steer()), CACHE, said)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    plain = loop(make_model("qwen2"), CACHE, None)
    assert all(not one.allclose(other, atol=1e-3) for one, other in zip(plain, found, strict=True))
