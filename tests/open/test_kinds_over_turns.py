"""Turns of one conversation that say things of several kinds: each keeps its own rule for which queries look there."""

from __future__ import annotations

import pytest
import torch
from kit.asking import cache_for, with_cache
from kit.tiny import make_model, make_prompt

from hf_steer import AttentionConfig, GateConfig, Saliency, SaliencyConfig, patch_model
from hf_steer.config.manners import MANNERS

FIRST, SECOND = [[3, ("image", 4, 3), 4]], [[2, ("image", 2, 3), 5]]
TEXT = slice(-4, -2)
"""Of a turn: the tokens that are pointed at."""


def text(tokens) -> Saliency:
    scores = torch.zeros(1, tokens)
    scores[:, TEXT] = 1
    return Saliency.from_tokens(scores)


def box() -> Saliency:
    return Saliency.from_boxes((0, 0, 9, 9), (42, 56))


@torch.no_grad()
def weights(first, second, *, source=None, then=None, **how):
    """Attention of the first layer, which alone is steered, in the second turn: `(heads, queries, keys)`."""
    config = AttentionConfig(heads={0: "all"}, saliency=SaliencyConfig(source=source), **how)
    model, inputs = patch_model(make_model("qwen2_vl", "eager"), config), make_prompt("qwen2_vl", FIRST)
    cache = with_cache(model, cache_for(model))
    model(**inputs, **cache, **({} if first is None else {"saliency": first}))
    begun = inputs["input_ids"].shape[1]
    later = {"input_ids": torch.arange(7, 14)[None]} if then is None else make_prompt("qwen2_vl", then, seed=1)
    later.pop("attention_mask", None)
    tokens = later["input_ids"].shape[1]
    later["position_ids"] = begun + torch.arange(tokens).expand(3, 1, -1)
    said = {} if second is None else {"saliency": second}
    return model(**later, **said, **cache, output_attentions=True).attentions[0][0]


def odds(steered, plain, inside, beside) -> torch.Tensor:
    """By how much a key's logit was moved against another's."""
    moved = (steered / plain).log()
    return moved[..., inside] - moved[..., beside]


@pytest.mark.parametrize("how", [{}, {"share": 0.5}, {"gate": GateConfig("entropy", initial=1.0)}])
def test_text_after_a_box_waits_for_the_answer_and_the_box_does_not(how):
    boxed, both = (weights(box(), said, **how) for said in (None, text(7)))
    torch.testing.assert_close(both[:, :-1], boxed[:, :-1])  # the second prompt looks at the box, and nowhere else
    plain = weights(None, None)
    assert not torch.allclose(boxed[:, :-1], plain[:, :-1], atol=1e-3)
    assert not torch.allclose(both[:, -1], boxed[:, -1], atol=1e-3)
    if not how:
        moved = odds(both[:, -1], plain[:, -1], -4, -1)
        torch.testing.assert_close(moved, torch.full_like(moved, MANNERS["tokens"].strength), rtol=1e-3, atol=1e-3)


def test_a_picture_after_a_text_is_looked_at_by_all_queries_and_the_text_still_waits():
    begun = make_prompt("qwen2_vl", FIRST)["input_ids"].shape[1]
    how = {"source": "feature_norm", "then": SECOND}
    seen, both = (weights(first, None, **how) for first in (Saliency.from_tokens(torch.zeros(1, begun)), text(begun)))
    torch.testing.assert_close(both[:, :-1], seen[:, :-1], rtol=1e-4, atol=1e-5)
    moved = odds(both[:, -1], seen[:, -1], begun - 4, begun - 1)
    torch.testing.assert_close(moved, torch.full_like(moved, MANNERS["tokens"].strength), rtol=1e-3, atol=1e-3)


def test_a_third_turn_that_says_nothing_goes_on_by_both_rules():
    config = AttentionConfig(heads={0: "all"}, saliency=SaliencyConfig(source=None))
    found = []
    for first, second in ((box(), text(7)), (box(), None), (None, None)):
        model = patch_model(make_model("qwen2_vl", "eager"), config)
        cache = with_cache(model, cache_for(model))
        with torch.no_grad():
            model(**make_prompt("qwen2_vl", FIRST), saliency=first, **cache)
            model(input_ids=torch.arange(7, 14)[None], saliency=second, **cache)
            found.append(model(input_ids=torch.arange(20, 26)[None], output_attentions=True, **cache).attentions[0][0])
    torch.testing.assert_close(found[0][:, :-1], found[1][:, :-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0][:, -1], found[1][:, -1], atol=1e-3)
    assert not torch.allclose(found[0][:, :-1], found[2][:, :-1], atol=1e-3)
