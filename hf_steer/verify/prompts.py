"""Inputs for those who bring none: two short prompts of unequal length, padded on the left, which end with text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_steer.errors import ConfigError
from hf_steer.ground.arguments import Given, name_of, named
from hf_steer.ground.parts import Anatomy
from hf_steer.ground.settings import setting, text_settings

TEXTS = ("Where is the red ball, left of the tree or right of it?", "Name the largest lake of the Alps.")
LENGTHS = (14, 9)
"""Of random prompts, in tokens."""


def short_prompts(anatomy: Anatomy, tokenizer: Any) -> dict[str, Any]:
    """Of the model's tokenizer; or of random words of its vocabulary.

    Raises:
        ConfigError: a model that reads no prompt.
    """
    if anatomy.decoder is None:
        raise ConfigError(f"{anatomy.family!r} reads no prompt that could be made up; give inputs=, as its processor makes them.")
    rows = None if tokenizer is None else written(tokenizer, TEXTS)
    if rows is None or not _are_words(rows, anatomy):
        rows = _drawn(anatomy)
    return padded_rows(rows, next(anatomy.root.parameters()).device)


def padded_rows(rows: Sequence[list[int]], device: Any) -> dict[str, Any]:
    """Prompts of unequal length as one batch, padded on the left with a word of their own, which its mask hides."""
    longest = max(map(len, rows))
    ids = torch.tensor([[row[0]] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return named(ids=ids, mask=mask)


def written(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Texts as token numbers, by a tokenizer or the one of a processor."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return [list(tokenizer(text)[named(ids=None).popitem()[0]]) for text in texts]


def _are_words(rows: Sequence[Sequence[int]], anatomy: Anatomy) -> bool:
    """Whether a tokenizer's numbers are some, and of this model: without files transformers makes one that knows no word."""
    return min(map(len, rows)) > 2 and max(map(max, rows)) < _words(anatomy)


def _words(anatomy: Anatomy) -> int:
    return int(setting(text_settings(anatomy.root), "words"))


def _drawn(anatomy: Anatomy) -> list[list[int]]:
    """From the middle of the vocabulary: what is special lies at its ends."""
    words, generator = _words(anatomy), torch.Generator().manual_seed(0)
    special = set(anatomy.placeholder_ids.values())
    drawn = [torch.randint(words // 4, 3 * words // 4, (4 * length,), generator=generator).tolist() for length in LENGTHS]
    return [[word for word in row if word not in special][:length] for row, length in zip(drawn, LENGTHS, strict=True)]


def check_inputs(inputs: Any) -> dict[str, Any]:
    """What a forward pass takes, without labels.

    Raises:
        ConfigError: no mapping, or parts that do not belong to each other.
    """
    if not isinstance(inputs, Mapping):
        raise ConfigError(f"inputs must be what the model's tokenizer or processor makes, a mapping; got {type(inputs).__name__}.")
    own = {name: value for name, value in inputs.items() if name not in named(labels=None)}
    given = Given(own)
    ids, mask = given.ids, given.mask
    if isinstance(ids, Tensor) and ids.ndim != 2:
        raise ConfigError(f"{name_of('ids')} must be (rows, tokens); got {tuple(ids.shape)}. Use return_tensors='pt'.")
    if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape != ids.shape:
        raise ConfigError(
            f"the inputs do not belong together: {name_of('ids')} is {tuple(ids.shape)}, {name_of('mask')} "
            f"{tuple(mask.shape)}. Make them with one call of the model's tokenizer or processor."
        )
    return own
