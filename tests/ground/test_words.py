"""Arguments by our words: read, written, replaced and named in messages."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import Cache

from hf_steer.ground.arguments import ARGUMENTS, Given, name_of, named, own_spellings, read_call, spelling_in, with_changes


class Renamed(nn.Module):
    """Its cache has a name that no table knows."""

    def forward(self, input_ids=None, attention_mask=None, kept_keys: Cache | None = None):
        raise NotImplementedError


class Two(nn.Module):
    """Either may hold the keys."""

    def forward(self, input_ids=None, prompt_keys: Cache | None = None, answer_keys: Cache | None = None):
        raise NotImplementedError


class Known(nn.Module):
    """The one that is known holds the keys, whatever else is a cache."""

    def forward(self, input_ids=None, past_key_values: Cache | None = None, encoder_keys: Cache | None = None):
        raise NotImplementedError


class Convolving(nn.Module):
    """A cache of something else."""

    def forward(self, input_ids=None, padding: "VoxtralConv1dPaddingCache | None" = None):  # noqa: F821, UP037
        raise NotImplementedError


class Quoted(nn.Module):
    """Its annotation is a string, of one kind of cache."""

    def forward(self, input_ids=None, kept_keys: "Optional[DynamicCache]" = None):  # noqa: F821, UP037
        raise NotImplementedError


RENAMED = {"cache": "kept_keys"}


@pytest.mark.parametrize(("kind", "own"), [(Renamed, RENAMED), (Quoted, RENAMED), (Two, {}), (Known, {}), (Convolving, {})])
def test_a_cache_of_an_unknown_name_is_the_only_argument_of_its_type_and_no_guess(kind, own):
    assert own_spellings(kind) == own
    assert spelling_in(kind(), "cache") == {Renamed: "kept_keys", Quoted: "kept_keys", Known: "past_key_values"}.get(kind)


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
