"""A cache with keys of which the steering knows nothing: said, unless the statement speaks of them or of none of them."""

from __future__ import annotations

import pytest
import torch
from kit.asking import (
    TOLERANCE,
    cache_for,
    logits,
    plain_logits,
    prompt,
    right_or_refused,
    steered,
    with_cache,
)
from kit.tiny import make_model, make_prompt

from hf_steer import Saliency, SteerError, disable_steering, get_steer_status, patch_model, unpatch_model, use_saliency

FIRST = 9


def filled(model, inputs, when):
    """The model, and a cache of the prompt that was filled while nothing was steered."""
    cache = cache_for(model)
    if when == "before patching":
        config = get_steer_status(model).config
        unpatch_model(model)
        logits(model, inputs, **with_cache(model, cache))
        patch_model(model, config)
    else:
        with disable_steering(model):
            logits(model, inputs, **with_cache(model, cache))
    return cache


when = pytest.mark.parametrize("when", ["before patching", "inside disable_steering"])


@when
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_steps_by_the_models_own_eyes_on_unseen_keys_are_refused(family, when):
    """The picture lies among keys whose saliency nobody recorded."""
    inputs, model = prompt(family), steered(family)
    cache, keys = filled(model, inputs, when), inputs["input_ids"].shape[1]
    with pytest.raises(SteerError, match=rf"\b{keys}\b.*keys"):
        logits(model, {"input_ids": torch.tensor([[5]])}, **with_cache(model, cache))


@when
def test_a_generate_by_the_models_own_eyes_on_unseen_keys_is_refused(when):
    inputs, model = prompt("qwen2_vl"), steered("qwen2_vl")
    cache, keys = filled(model, inputs, when), inputs["input_ids"].shape[1]
    longer = {name: torch.nn.functional.pad(inputs[name], (0, 1), value=value)
              for name, value in (("input_ids", 5), ("attention_mask", 1), ("mm_token_type_ids", 0))}  # fmt: skip
    with pytest.raises(SteerError, match=rf"\b{keys}\b.*keys"):
        model.generate(**longer, **with_cache(model, cache), max_new_tokens=3, do_sample=False)


@when
def test_a_second_turn_with_a_picture_on_unseen_keys_is_refused(when):
    first, model = prompt("qwen2_vl"), steered("qwen2_vl")
    cache, keys = filled(model, first, when), first["input_ids"].shape[1]
    second = make_prompt("qwen2_vl", [[2, ("image", 3, 2), 3]], seed=1)
    later = {name: value for name, value in second.items() if name != "attention_mask"}
    with pytest.raises(SteerError, match=rf"\b{keys}\b.*keys"):
        logits(model, later, **with_cache(model, cache))


@when
def test_the_refusal_names_a_way_out(when):
    inputs, model = prompt("qwen2_vl"), steered("qwen2_vl")
    cache = filled(model, inputs, when)
    with pytest.raises(SteerError, match="disable_steering|from_tokens"):
        logits(model, {"input_ids": torch.tensor([[5]])}, **with_cache(model, cache))
    untouched = plain_logits(model, {"input_ids": torch.tensor([[5]])}, **with_cache(model, cache))
    assert torch.isfinite(untouched).all()  # the refused pass left the cache as it was
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 1


@when
def test_a_statement_about_the_whole_conversation_is_right(when):
    """The old keys were made by unsteered passes; the step is steered towards all that it reads."""
    inputs, model = prompt("qwen2", tokens=FIRST), steered("qwen2", normalize="none")
    cache = filled(model, inputs, when)
    scores = torch.randn(1, FIRST + 2)
    ids = torch.tensor([[5, 6]])
    found = logits(model, {"input_ids": ids}, Saliency.from_tokens(scores), **with_cache(model, cache))
    expected = biased_by_hand(inputs["input_ids"], ids, scores)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@when
def test_a_statement_about_the_new_tokens_alone_is_right(when):
    inputs, model = prompt("qwen2", tokens=FIRST), steered("qwen2", normalize="none")
    cache = filled(model, inputs, when)
    scores, ids = torch.randn(1, 2), torch.tensor([[5, 6]])
    found = logits(model, {"input_ids": ids}, Saliency.from_tokens(scores), **with_cache(model, cache))
    expected = biased_by_hand(inputs["input_ids"], ids, torch.nn.functional.pad(scores, (FIRST, 0)))
    torch.testing.assert_close(found, expected, **TOLERANCE)


@when
def test_one_statement_over_several_steps_is_right_or_refused(when):
    """Scores for the whole conversation, then more tokens of which nothing is said."""
    inputs, model = prompt("qwen2", tokens=FIRST), steered("qwen2", normalize="none")
    cache, scores = filled(model, inputs, when), torch.randn(1, FIRST + 2)

    def two_calls():
        with use_saliency(model, Saliency.from_tokens(scores)):
            logits(model, {"input_ids": torch.tensor([[5, 6]])}, **with_cache(model, cache))
            return logits(model, {"input_ids": torch.tensor([[7]])}, **with_cache(model, cache))

    expected = biased_by_hand(inputs["input_ids"], torch.tensor([[5, 6, 7]]), torch.nn.functional.pad(scores, (0, 1)))[:, -1:]
    right_or_refused(two_calls, expected, "keys")


def biased_by_hand(first, later, scores):
    """The unpatched model: `first` as ever, then `later` with λ·s in its mask."""
    model = make_model("qwen2")
    cache = cache_for(model)
    logits(model, {"input_ids": first}, **with_cache(model, cache))
    old, new = first.shape[1], later.shape[1]
    causal = torch.ones(new, old + new, dtype=torch.bool).tril(old)
    mask = torch.where(causal, 3.0 * scores[:, None, None, :], torch.finfo(torch.float32).min)
    return logits(model, {"input_ids": later, "attention_mask": mask}, **with_cache(model, cache))


@when
def test_a_statement_that_fits_neither_is_refused(when):
    inputs, model = prompt("qwen2", tokens=FIRST), steered("qwen2")
    cache = filled(model, inputs, when)
    with pytest.raises(SteerError, match="tokens"):
        logits(model, {"input_ids": torch.tensor([[5, 6]])}, Saliency.from_tokens(torch.randn(1, 5)), **with_cache(model, cache))


@when
def test_a_box_in_a_picture_among_unseen_keys_is_refused(when):
    inputs, model = prompt("qwen2_vl"), steered("qwen2_vl")
    cache = filled(model, inputs, when)
    box = Saliency.from_boxes((0, 0, 10, 10), (30, 30))
    with pytest.raises(SteerError, match="image|picture|keys"):
        logits(model, {"input_ids": torch.tensor([[5]])}, box, **with_cache(model, cache))


@when
def test_nothing_asked_of_an_unseen_cache_is_never_refused(when):
    inputs, model = prompt("qwen2", tokens=FIRST), steered("qwen2")
    cache = filled(model, inputs, when)
    found = logits(model, {"input_ids": torch.tensor([[5]])}, **with_cache(model, cache))
    bare = make_model("qwen2")
    own = cache_for(bare)
    logits(bare, inputs, **with_cache(bare, own))
    assert torch.equal(found, logits(bare, {"input_ids": torch.tensor([[5]])}, **with_cache(bare, own)))


def test_a_cache_of_text_that_the_steered_model_read_goes_on():
    """It holds keys, and the steering saw them: they have no score."""
    model = steered("qwen2_vl")
    text = {"input_ids": torch.randint(2, 80, (1, 5))}
    cache = cache_for(model)
    before = logits(model, text, **with_cache(model, cache))
    after = logits(model, {"input_ids": torch.tensor([[5]])}, **with_cache(model, cache))
    whole = plain_logits(model, {"input_ids": torch.cat([text["input_ids"], torch.tensor([[5]])], 1)})
    torch.testing.assert_close(torch.cat([before, after], 1), whole, **TOLERANCE)


def test_a_static_cache_that_is_longer_than_what_it_holds_is_no_unseen_cache():
    model, inputs = steered("qwen2_vl"), prompt("qwen2_vl")
    dynamic = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    static = model.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(static, dynamic)
