"""A model that is called while it generates: by its own criteria, processors, drafts, and generate functions of one's own."""

from __future__ import annotations

import pytest
import torch
from kit.asking import (
    TOLERANCE,
    answer_or_refusal,
    cache_for,
    generate,
    logits,
    look,
    plain_generate,
    plain_logits,
    prompt,
    right_or_refused,
    steered,
    with_cache,
)
from transformers import LogitsProcessor, StoppingCriteria

from hf_steer import Saliency, disable_steering, use_saliency


@pytest.fixture
def asked():
    model, inputs = steered("qwen2", normalize="none"), prompt("qwen2")
    return model, inputs, look(inputs)


class Asking(LogitsProcessor):
    """Runs something at every step, changes nothing, and keeps what came back."""

    def __init__(self, act):
        self.act, self.found = act, []

    def __call__(self, input_ids, scores):
        self.found.append(self.act(input_ids))
        return scores


class Stopping(Asking, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        super().__call__(input_ids, scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def run(model, inputs, said, act, kind):
    """The outer tokens, and what the inner calls gave; an error of either comes out."""
    asking = (Stopping if kind == "stopping_criteria" else Asking)(act)
    return generate(model, inputs, said, **{kind: [asking]}), asking.found


kinds = pytest.mark.parametrize("kind", ["stopping_criteria", "logits_processor"])


@kinds
def test_a_generate_inside_generate_is_right_or_refused(asked, kind):
    """The statement in force speaks of a prompt as long as the inner one: it holds for that, too."""
    model, inputs, said = asked
    other = prompt("qwen2", seed=1)
    expected, inner = generate(model, inputs, said), generate(model, other, said, max_new_tokens=3)
    assert not torch.equal(inner, plain_generate(model, other, max_new_tokens=3))
    answer, refusal = answer_or_refusal(
        lambda: run(model, inputs, said, lambda ids: model.generate(**other, max_new_tokens=3, do_sample=False), kind)
    )
    if refusal is not None:
        assert "disable_steering" in refusal
        return
    found, calls = answer
    assert torch.equal(found, expected)
    assert all(torch.equal(call, inner) for call in calls)


@kinds
@pytest.mark.parametrize("how", ["saliency=", "use_saliency"])
def test_a_generate_inside_with_its_own_statement_is_steered_by_it(asked, kind, how):
    model, inputs, said = asked
    other, own = prompt("qwen2", tokens=7, seed=1), Saliency.from_tokens(torch.randn(1, 7))
    expected, inner = generate(model, inputs, said), generate(model, other, own, max_new_tokens=3)
    statement = {"saliency": own} if how == "saliency=" else {"statement": own}
    found, calls = run(model, inputs, said, lambda ids: generate(model, other, **statement, max_new_tokens=3), kind)
    assert torch.equal(found, expected)
    assert all(torch.equal(call, inner) for call in calls)
    assert len(calls) == 6


@kinds
def test_a_generate_inside_that_switches_off_is_plain(asked, kind):
    model, inputs, said = asked
    other = prompt("qwen2", seed=1)
    expected, inner = generate(model, inputs, said), plain_generate(model, other, max_new_tokens=3)
    found, calls = run(model, inputs, said, lambda ids: plain_generate(model, other, max_new_tokens=3), kind)
    assert torch.equal(found, expected)
    assert all(torch.equal(call, inner) for call in calls)


def test_own_eyes_see_the_picture_of_an_inner_generate():
    model, inputs, other = steered("qwen2_vl"), prompt("qwen2_vl"), prompt("qwen2_vl", seed=1)
    expected, inner = generate(model, inputs), generate(model, other, max_new_tokens=3)
    answer, refusal = answer_or_refusal(
        lambda: run(model, inputs, None, lambda ids: generate(model, other, max_new_tokens=3), "stopping_criteria")
    )
    if refusal is not None:
        assert "disable_steering" in refusal
        return
    found, calls = answer
    assert torch.equal(found, expected)
    assert all(torch.equal(call, inner) for call in calls)


@pytest.mark.parametrize("extra", [{}, {"num_assistant_tokens": 2}])
def test_drafts_by_the_same_model_equal_greedy(asked, extra):
    model, inputs, said = asked
    expected = generate(model, inputs, said)
    assert not torch.equal(expected, plain_generate(model, inputs))
    for name, value in extra.items():
        setattr(model.generation_config, name, value)
    assert torch.equal(generate(model, inputs, said, assistant_model=model), expected)


def test_a_processor_that_reads_the_whole_sequence_again_is_right_or_refused(asked):
    model, inputs, said = asked
    expected = generate(model, inputs, said)

    def whole(ids):
        with torch.no_grad():
            return model(ids).logits

    answer, refusal = answer_or_refusal(lambda: run(model, inputs, said, whole, "logits_processor"))
    if refusal is not None:
        assert "disable_steering" in refusal
        assert "saliency=" in refusal
        return
    found, calls = answer
    assert torch.equal(found, expected)
    for number, call in enumerate(calls):
        ids = expected[:, : 9 + number]
        padded = Saliency.from_tokens(torch.nn.functional.pad(said.tokens, (0, number)))
        torch.testing.assert_close(call, logits(model, {"input_ids": ids}, padded), **TOLERANCE)


@pytest.mark.parametrize("cached", [False, True])
def test_a_processor_that_reads_another_prompt_is_right_or_refused(asked, cached):
    model, inputs, said = asked
    other = prompt("qwen2", seed=1)["input_ids"]
    right = logits(model, {"input_ids": other}, said)
    assert not torch.allclose(right, plain_logits(model, {"input_ids": other}), atol=1e-2)

    def read(ids):
        own = with_cache(model, cache_for(model)) if cached else {"use_cache": False}
        with torch.no_grad():
            return model(other, **own).logits

    answer, refusal = answer_or_refusal(lambda: run(model, inputs, said, read, "logits_processor"))
    if refusal is not None:
        assert "disable_steering" in refusal
        assert "saliency=" in refusal
        return
    _, calls = answer
    for call in calls:
        torch.testing.assert_close(call, right, **TOLERANCE)


def test_a_processor_with_a_cache_of_its_own_over_many_steps_is_right_or_refused(asked):
    """Contrastive decoding against another prompt: its cache grows beside the outer one."""
    model, inputs, said = asked
    other = prompt("qwen2", seed=1)["input_ids"]
    held = []

    def follow(ids):
        with torch.no_grad():
            new = other if not held else ids[:, -1:]
            if not held:
                held.append(cache_for(model))
            return model(new, **with_cache(model, held[0])).logits[:, -1]

    expected = generate(model, inputs, said)
    answer, refusal = answer_or_refusal(lambda: run(model, inputs, said, follow, "logits_processor"))
    if refusal is not None:
        assert "disable_steering" in refusal
        assert "saliency=" in refusal
        return
    found, calls = answer
    assert torch.equal(found, expected)
    cache = cache_for(model)
    with use_saliency(model, said):
        fed = [logits(model, {"input_ids": other}, **with_cache(model, cache))[:, -1]]
    fed += [logits(model, {"input_ids": expected[:, at : at + 1]}, **with_cache(model, cache))[:, -1] for at in range(9, 14)]
    torch.testing.assert_close(torch.stack(calls), torch.stack(fed), **TOLERANCE)


@pytest.mark.parametrize("cached", [False, True])
def test_a_processor_that_switches_off_works(asked, cached):
    model, inputs, said = asked
    other, expected = prompt("qwen2", seed=1)["input_ids"], generate(model, inputs, said)

    def read(ids):
        own = with_cache(model, cache_for(model)) if cached else {}
        with torch.no_grad(), disable_steering(model):
            return model(other, **own).logits

    found, calls = run(model, inputs, said, read, "logits_processor")
    assert torch.equal(found, expected)
    assert all(torch.equal(call, plain_logits(model, {"input_ids": other})) for call in calls)


@pytest.mark.parametrize("own", ["saliency=", "use_saliency"])
def test_a_processor_that_says_where_to_look_is_steered_there(asked, own):
    model, inputs, said = asked
    other, there = prompt("qwen2", tokens=7, seed=1), Saliency.from_tokens(torch.randn(1, 7))
    expected, right = generate(model, inputs, said), logits(model, other, there)

    def read(ids):
        return logits(model, other, saliency=there) if own == "saliency=" else logits(model, other, there)

    found, calls = run(model, inputs, said, read, "logits_processor")
    assert torch.equal(found, expected)
    for call in calls:
        torch.testing.assert_close(call, right, **TOLERANCE)


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_keeps_working(asked, use_cache):
    """Its unconditional pass is unsteered by design."""
    model, inputs, said = asked
    found = generate(model, inputs, said, guidance_scale=1.5, use_cache=use_cache)
    assert not torch.equal(found, plain_generate(model, inputs, guidance_scale=1.5, use_cache=use_cache))
    assert torch.equal(found, generate(model, inputs, said, guidance_scale=1.5))


def right_twice(model, inputs, said, expected, telling="disable_steering|custom_generate"):
    def twice(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        """The prompt read twice, each time into a fresh cache; the second answer counts."""
        outcomes = []
        for _ in range(2):
            cache, ids = cache_for(model), input_ids
            for _ in range(6):
                new = ids if cache.get_seq_length() == 0 else ids[:, -1:]
                scores = model(new, **with_cache(model, cache)).logits[:, -1]
                ids = torch.cat([ids, logits_processor(ids, scores).argmax(-1)[:, None]], 1)
            outcomes.append(ids)
        return torch.stack(outcomes)

    right_or_refused(lambda: generate(model, inputs, said, custom_generate=twice), torch.stack([expected, expected]), telling)


def test_a_generate_of_ones_own_with_two_fresh_caches_is_steered_in_both(asked):
    model, inputs, said = asked
    expected = generate(model, inputs, said)
    assert not torch.equal(expected, plain_generate(model, inputs))
    right_twice(model, inputs, said, expected)


def test_a_generate_of_ones_own_by_a_statement_per_call(asked):
    model, inputs, said = asked
    expected = generate(model, inputs, said)
    seen = []

    def once(model, input_ids, **kwargs):
        seen.append(kwargs)
        with torch.no_grad():
            return model(input_ids).logits

    found = generate(model, inputs, saliency=said, custom_generate=once)
    torch.testing.assert_close(found[:, -1].argmax(-1), expected[:, 9])
    assert len(seen) == 1
