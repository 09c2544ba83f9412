"""Rows of a cache that move in ways that nobody knows: their saliency moves along, or it is said."""

from __future__ import annotations

import copy

import pytest
import torch
from kit.asking import logits, prompt, right_or_refused, steered, with_cache
from transformers import DynamicCache, StaticCache

from hf_steer import Saliency

NEXT = {"input_ids": torch.tensor([[5], [5]])}


class Shuffling(DynamicCache):
    """With a method of its own, as a sampler or a search may add one."""

    def shuffle_rows(self, index):
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]


def filled(kind=DynamicCache, family="qwen2", tokens=9, **kwargs):
    """A steered model and a cache of two rows of which other things are said."""
    model, inputs = steered(family), prompt(family, rows=2, tokens=tokens)
    cache = kind(config=model.config, **kwargs)
    logits(model, inputs, Saliency.from_tokens(torch.randn(2, tokens)), **with_cache(model, cache))
    return model, cache


def follow(model, cache):
    return logits(model, NEXT, **with_cache(model, cache))


def straight(model, cache):
    found = follow(model, copy.deepcopy(cache))
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    return found


def test_rows_that_an_unknown_method_moved_take_their_saliency_along_or_it_is_said():
    model, cache = filled(Shuffling)
    expected = straight(model, cache).flip(0)

    def moved():
        cache.shuffle_rows(torch.tensor([1, 0]))
        return follow(model, cache)

    right_or_refused(moved, expected, "shuffle_rows|rows")


def test_rows_of_one_prompt_that_look_elsewhere_are_told_apart():
    """Keys of the first layer are alike in all of them."""
    model, inputs, cache = steered(), {name: own.repeat(2, 1) for name, own in prompt().items()}, Shuffling()
    logits(model, inputs, Saliency.from_tokens(torch.randn(2, 9)), **with_cache(model, cache))
    assert torch.equal(*cache.layers[0].keys)
    expected = straight(model, cache).flip(0)

    def moved():
        cache.shuffle_rows(torch.tensor([1, 0]))
        return follow(model, cache)

    right_or_refused(moved, expected, "shuffle_rows|rows")


def test_an_unknown_method_that_moves_nothing_may_be_there():
    model, cache = filled(Shuffling)
    assert torch.equal(follow(model, copy.deepcopy(cache)), follow(model, cache))


def exchange(layer):
    layer.keys, layer.values = layer.keys.flip(0), layer.values.flip(0)


def overwrite(layer):
    layer.keys.copy_(layer.keys.flip(0))
    layer.values.copy_(layer.values.flip(0))


@pytest.mark.parametrize("move", [exchange, overwrite])
@pytest.mark.parametrize("family", ["qwen2", "mistral"])  # mistral's window is seven keys wide, and every layer has one
@pytest.mark.parametrize("static", [False, True])
def test_layers_whose_rows_were_moved_by_hand_are_followed_or_it_is_said(move, family, static):
    model, cache = filled(StaticCache, family, 5, max_cache_len=12) if static else filled(DynamicCache, family, 5)
    expected = straight(model, cache).flip(0)

    def moved():
        for layer in cache.layers:
            move(layer)
        return follow(model, cache)

    right_or_refused(moved, expected, "rows|cache")


@pytest.mark.parametrize("tokens", [3, 5, 6, 7, 9])
def test_a_window_that_fills_up_is_no_move(tokens):
    model, cache = filled(family="mistral", tokens=tokens)
    twin = copy.deepcopy(cache)
    for _ in range(6):
        assert torch.equal(follow(model, cache), follow(model, twin))
        twin = copy.deepcopy(twin)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_that_is_reordered_moves_its_own_saliency(copied):
    model, cache = filled()
    expected = straight(model, cache)
    twin = copied(cache)
    twin.reorder_cache(torch.tensor([1, 0]))
    right_or_refused(lambda: follow(model, copy.deepcopy(twin)), expected.flip(0), "reorder_cache|copy")


def test_a_deep_copy_and_its_original_are_independent():
    model, cache = filled()
    expected = straight(model, cache)
    twin = copy.deepcopy(cache)
    twin.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(follow(model, copy.deepcopy(cache)), expected)
    cache.batch_select_indices(torch.tensor([0]))
    torch.testing.assert_close(follow(model, twin), expected.flip(0), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("act", [
    lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([3, 0]))),
], ids=["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])  # fmt: skip
@pytest.mark.parametrize("copied", [lambda cache: cache, copy.deepcopy], ids=["itself", "a copy"])
def test_known_methods_of_a_cache_and_of_its_copies_are_followed(act, copied):
    model, cache = filled(Shuffling)
    expected = straight(model, cache).flip(0)
    twin = copied(cache)
    act(twin)
    torch.testing.assert_close(follow(model, twin), expected, rtol=1e-4, atol=2e-5)


def test_a_subclass_that_moves_rows_through_a_known_method_is_followed():
    class Searching(DynamicCache):
        def keep_best(self, order):
            self.reorder_cache(order)

    model, cache = filled(Searching)
    expected = straight(model, cache).flip(0)
    cache.keep_best(torch.tensor([1, 0]))
    torch.testing.assert_close(follow(model, cache), expected, rtol=1e-4, atol=2e-5)
