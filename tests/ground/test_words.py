"""Arguments by our words: read, written, replaced and named in messages."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import Cache

from hf_steer.ground.arguments import ARGUMENTS, Given, name_of, named, read_call, with_changes


class Renamed(nn.Module):
    """Its cache has a name that no table knows."""

    def forward(self, input_ids=None, attention_mask=None, kept_keys: Cache | None = None):
        raise NotImplementedError


@pytest.mark.parametrize("word", ["ids", "mask", "image_pixels", "image_grids", "token_kinds"])
def test_what_is_written_by_a_word_is_read_by_it(word):
    value = object()
    assert getattr(Given(named(**{word: value})), word) is value


def test_a_message_names_the_newest_spelling_and_the_older_ones():
    assert name_of("ids") == "input_ids"
    newest, older = ARGUMENTS["cache"]
    assert name_of("cache") == f"{newest} ({older})"


def test_another_argument_is_not_written_over_a_cache_of_unknown_name():
    model, cache, mask = Renamed(), object(), object()
    given = read_call(model, (), {"input_ids": 1, "kept_keys": cache})
    assert given.cache is cache
    assert with_changes(model, given, mask=mask) == {"input_ids": 1, "kept_keys": cache, "attention_mask": mask}
    assert with_changes(model, given, cache=None) == {"input_ids": 1, "kept_keys": None}
