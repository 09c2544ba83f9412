"""Stretches of the prompt's text as scores of its tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.ground.arguments import name_of


def char_scores(
    spans: Sequence[Sequence[tuple[int, int]]], offset_mapping: Any, weights: Sequence[float] | None
) -> Tensor:
    """`(batch, tokens)` scores of the tokens that stretches of characters touch; see `Saliency.from_char_spans`."""
    offsets = torch.as_tensor(np.asarray(offset_mapping))
    if offsets.ndim != 3 or offsets.shape[-1] != 2:
        raise SaliencyError(
            f"offset_mapping must have shape (batch, tokens, 2); got {tuple(offsets.shape)}. "
            "Call the tokenizer with a list of prompts and return_offsets_mapping=True."
        )
    if len(spans) != len(offsets):
        raise SaliencyError(f"{len(spans)} rows of spans for {len(offsets)} rows of tokens; give one list per row.")
    scores = torch.zeros(offsets.shape[:2])
    for row, (row_spans, pairs) in enumerate(zip(spans, offsets, strict=True)):
        start_of, end_of = pairs[:, 0], pairs[:, 1]
        for number, (start, end) in enumerate(row_spans):
            if not 0 <= start < end <= int(end_of.max()):
                raise SaliencyError(
                    f"row {row}: characters {start} to {end} are empty or outside its text of {int(end_of.max())} "
                    "characters; spans are (start, end) with the end excluded."
                )
            weight = 1.0 if weights is None else float(weights[number])
            scores[row, (start_of < end) & (end_of > start)] = weight
    return scores


def text_scores(substrings: str | Sequence[str | Sequence[str]], tokenizer: Any, ids: Any, occurrence: int | None) -> Tensor:
    """`(batch, tokens)` scores: 1 for the tokens that the substrings touch; see `Saliency.from_text`."""
    rows = torch.atleast_2d(torch.as_tensor(ids if isinstance(ids, Tensor) else np.asarray(ids))).cpu()
    per_row = [substrings] * len(rows) if isinstance(substrings, str) else substrings
    wanted = [[own] if isinstance(own, str) else list(own) for own in per_row]
    if rows.ndim != 2 or len(wanted) != len(rows):
        raise SaliencyError(
            f"{len(wanted)} entries of substrings came for {name_of('ids')} of shape {tuple(rows.shape)}; give one entry per row, "
            "each a string or a list of strings, or one string for all rows."
        )
    scores = torch.zeros(rows.shape)
    for row, (tokens, own) in enumerate(zip(rows.tolist(), wanted, strict=True)):
        text = _decode(tokenizer, tokens)
        for substring in own:
            start = _find(substring, text, occurrence, row)
            first, last = _tokens_of(tokenizer, tokens, start, start + len(substring))
            if substring.strip() not in _decode(tokenizer, tokens[first:last]):
                raise SaliencyError(
                    f"row {row}: this tokenizer does not decode token by token, so the tokens of {substring!r} cannot be told. Use "
                    "Saliency.from_char_spans with the offsets that it returns."
                )
            scores[row, first:last] = 1
    return scores


def _find(substring: str, text: str, occurrence: int | None, row: int) -> int:
    """Where a substring begins."""
    starts = []
    start = text.find(substring) if substring else -1
    while start >= 0:
        starts.append(start)
        start = text.find(substring, start + 1)
    if not starts:
        raise SaliencyError(f"row {row}: {substring!r} is not in its text, which reads {_short(text)!r}.")
    if occurrence is None and len(starts) > 1:
        raise SaliencyError(
            f"row {row}: {substring!r} is there {len(starts)} times; say which with occurrence=, from 0, or quote more of the text."
        )
    if occurrence is not None and not 0 <= occurrence < len(starts):
        raise SaliencyError(f"row {row}: {substring!r} is there {len(starts)} times, counted from 0; got occurrence={occurrence}.")
    return starts[occurrence or 0]


def _tokens_of(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> tuple[int, int]:
    """First and last (excluded) token of a stretch of the decoded text.

    What the first tokens decode to is the beginning of the text, so its length tells which characters the next one adds. Bytes of
    a character that is not complete yet decode to U+FFFD, which is not counted.
    """

    def length(count: int) -> int:
        return len(_decode(tokenizer, ids[:count]).rstrip("\ufffd"))

    counts = range(len(ids) + 1)
    before = length(bisect_right(counts, start, key=length) - 1)
    return bisect_left(counts, before, key=length), bisect_left(counts, end, key=length)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _short(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
