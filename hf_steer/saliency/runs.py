"""How many placeholder tokens each picture of a prompt has, where only the prompt tells: they stand in runs."""

from __future__ import annotations

import itertools
from typing import Literal

from torch import Tensor


def count_by_runs(ids: Tensor, token: int, marked: Literal["first", "last"]) -> list[int]:
    """Tokens of each picture, row by row.

    Processors write another token before a picture's first run than before its others, or before its last one, of the whole
    picture behind its tiles. It is read off the row's own first, or last, run.

    Args:
        ids: token numbers, `(batch, tokens)`.
        token: the placeholder.
        marked: which run of a picture has its own token before it.
    """
    counts = []
    for row in ids.tolist():
        runs = _runs(row, token)
        mark = runs[0 if marked == "first" else -1][0] if runs else None
        ended = True
        for before, length in runs:
            begins = before == mark if marked == "first" else ended
            if begins:
                counts.append(length)
            else:
                counts[-1] += length
            ended = before == mark
    return counts


def _runs(row: list[int], token: int) -> list[tuple[int | None, int]]:
    """Of each run the token before it, and its length."""
    runs, place = [], 0
    for same, group in itertools.groupby(row, lambda own: own == token):
        length = sum(1 for _ in group)
        if same:
            runs.append((row[place - 1] if place else None, length))
        place += length
    return runs
