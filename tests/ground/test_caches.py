"""What is known of caches: which of their methods move rows, and who is told when they do."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache, cache_utils

from hf_steer.errors import PatchError
from hf_steer.ground.caches import ROW_MOVES, ROWS_STAY, Watched, unknown_moves, watch_rows

KINDS = [kind for kind in vars(cache_utils).values() if isinstance(kind, type) and issubclass(kind, cache_utils.Cache)]
SPECIAL = {"DFlashCache"}
"""Of drafting alone; `generate` makes it for no model that is steered."""


class Forking(DynamicCache):
    """Two methods that nobody knows, and three that are none of a cache's own acts."""

    label = "forking"

    def fork_rows(self, rows, times=1):
        return rows

    def _inner(self):
        return None

    @property
    def width(self):
        return 1

    @staticmethod
    def parse(text):
        return text


def told():
    heard = []
    return heard, lambda cache, name, argument: heard.append((cache, name, argument))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.__name__ not in SPECIAL], ids=lambda kind: kind.__name__)
def test_every_method_of_transformers_own_caches_is_known(kind):
    assert unknown_moves(kind) == ()


def test_what_is_known_is_told_apart():
    assert not ROWS_STAY & ROW_MOVES.keys()
    for kind in (DynamicCache, cache_utils.StaticCache):
        assert all(callable(getattr(kind, name)) for name in ROW_MOVES)


def test_a_method_that_nobody_knows_is_one_that_may_move_rows():
    assert unknown_moves(Forking) == ("fork_rows",)


def test_every_call_that_may_move_rows_is_told_with_its_argument_after_it_ran():
    cache = Forking()
    heard, tell = told()
    watch_rows(cache, tell)
    rows = torch.tensor([0])
    assert cache.fork_rows(rows, times=2) is rows
    cache.reorder_cache(rows)
    cache.batch_select_indices(indices=rows)
    cache.reset()
    assert [(name, argument is rows) for _, name, argument in heard] == [
        ("fork_rows", True), ("reorder_cache", True), ("batch_select_indices", True), ("reset", False)
    ]  # fmt: skip
    assert all(own is cache for own, _, _ in heard)


def test_a_call_that_fails_is_not_told():
    cache = Forking()
    heard, tell = told()
    watch_rows(cache, tell)
    with pytest.raises(TypeError, match="rows"):
        cache.fork_rows()
    assert heard == []


def test_watching_twice_tells_once():
    cache = Forking()
    heard, tell = told()
    for _ in range(3):
        watch_rows(cache, tell)
    cache.fork_rows(1)
    assert [(name, argument) for _, name, argument in heard] == [("fork_rows", 1)]


def test_a_deep_copy_tells_of_itself():
    cache = Forking()
    heard, tell = told()
    watch_rows(cache, tell)
    twin = copy.deepcopy(cache)
    twin.fork_rows(1)
    cache.fork_rows(2)
    assert [(own is twin, argument) for own, _, argument in heard] == [(True, 1), (False, 2)]


def note(cache, name, argument):
    cache.noted = name, argument


def test_a_pickled_cache_tells_of_what_is_loaded():
    cache = Forking()
    watch_rows(cache, note)
    twin = pickle.loads(pickle.dumps(cache))
    twin.fork_rows(3)
    assert twin.noted == ("fork_rows", 3)
    assert not hasattr(cache, "noted")


def test_watching_keeps_no_cache_alive():
    cache = Forking()
    watch_rows(cache, note)
    seen = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert seen() is None
    finally:
        gc.enable()


def test_a_shallow_copy_of_a_cache_that_is_gone_says_how_to_copy():
    cache = Forking()
    watch_rows(cache, note)
    twin = copy.copy(cache)
    assert isinstance(vars(twin)["fork_rows"], Watched)
    del cache
    with pytest.raises(PatchError, match=r"fork_rows was called on a shallow copy.*copy\.deepcopy"):
        twin.fork_rows(1)
