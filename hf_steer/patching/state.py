"""What rides on the KV cache: saliency belongs to the keys, so it lives and dies with the cache that holds them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.errors import SaliencyError
from hf_steer.saliency import Saliency
from hf_steer.values import Span, TokenScores

_ATTRIBUTE = "hf_steer_state"


@dataclass(frozen=True)
class CacheState:
    """The saliency of the keys in one cache.

    Attributes:
        scores: normalised, `(rows, prompt tokens so far)`; keys after them have none.
        spans: pictures and videos among those keys.
        strengths: λ, `(steered layers, heads)`.
        statement: what the user said, if these scores come from the user.
        speaks: whether any key has a score; known at prefill, so that a decode step need not ask the device.
    """

    scores: TokenScores
    spans: tuple[Span, ...]
    strengths: Tensor
    statement: Saliency | None
    speaks: bool

    def until(self, length: int) -> CacheState:
        """The part that speaks of the first `length` keys: a cache may have been cropped or reset since."""
        if self.scores.values.shape[1] <= length:
            return self
        scores = TokenScores(self.scores.values[:, :length], self.scores.group[:, :length])
        spans = tuple(span for span in self.spans if int(span.positions[-1]) < length)
        return dataclasses.replace(self, scores=scores, spans=spans)

    def for_rows(self, rows: int) -> CacheState:
        """Rows repeated as `generate` repeats them for beams (a beam never leaves its prompt's rows).

        Raises:
            SaliencyError: the cache has been cut to other rows.
        """
        own = self.scores.values.shape[0]
        if rows == own:
            return self
        if rows % own:
            raise SaliencyError(
                f"the cache's saliency has {own} rows, this call has {rows}; rows may be repeated, not selected. "
                "Start from a fresh cache."
            )
        times = rows // own
        scores = TokenScores(
            self.scores.values.repeat_interleave(times, 0), self.scores.group.repeat_interleave(times, 0)
        )
        spans = tuple(
            dataclasses.replace(span, row=span.row * times + copy) for span in self.spans for copy in range(times)
        )
        return dataclasses.replace(self, scores=scores, spans=tuple(sorted(spans, key=lambda span: span.row)))

    def window(self, offset: int, length: int) -> TokenScores:
        """Scores of the keys `offset` to `offset + length`, 0 for those after the prompt."""
        missing = max(0, offset + length - self.scores.values.shape[1])
        keys = slice(offset, offset + length)
        return TokenScores(
            F.pad(self.scores.values, (0, missing))[:, keys], F.pad(self.scores.group, (0, missing), value=-1)[:, keys]
        )


def read_state(cache: Any) -> CacheState | None:
    """The state that rides on a cache, if one does."""
    return getattr(cache, _ATTRIBUTE, None)


def write_state(cache: Any, state: CacheState) -> None:
    setattr(cache, _ATTRIBUTE, state)


def join_scores(old: TokenScores, new: TokenScores) -> TokenScores:
    """New scores after old ones; `new` covers all keys, `old` the first of them. Groups stay apart."""
    length = old.values.shape[1]
    first_group = int(old.group.max()) + 1 if old.group.numel() else 0
    moved = torch.where(new.group < 0, -1, new.group + first_group)
    return TokenScores(
        torch.cat([old.values, new.values[:, length:]], 1), torch.cat([old.group, moved[:, length:]], 1)
    )
