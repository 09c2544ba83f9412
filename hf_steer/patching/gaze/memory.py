"""What rides on the KV cache: saliency belongs to the keys, so it lives and dies with the cache that holds them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.gating import GateState
from hf_steer.ground.caches import (
    ROW_MOVES,
    begins_with_first,
    caches_after,
    first_keys,
    past_of,
    shown_keys,
    stamp_of,
    watch_rows,
)
from hf_steer.saliency import Saliency
from hf_steer.values import Span, TokenScores

_ATTRIBUTE, _SEEN = "hf_steer_state", "hf_steer_keys"
"""What a cache carries: its state, and which keys that was written for."""


@dataclass(frozen=True)
class Gates:
    """What the gates remember.

    Attributes:
        history: the state after each of the last pass's generated tokens, since drafts may be taken back.
        end: keys in the cache after the last of them.
    """

    history: tuple[GateState, ...]
    end: int | Tensor

    def select(self, rows: Tensor) -> Gates:
        """Other rows, or the same in another order."""
        rows = rows.to(self.history[0].value.device)
        return Gates(tuple(state.select(rows) for state in self.history), self.end)

    def after(self, past: int | Tensor) -> GateState:
        """The state when `past` keys are in the cache."""
        if len(self.history) == 1:
            return self.history[0]
        back = int(self.end) - int(past)
        return self.history[max(0, len(self.history) - 1 - back)]


@dataclass(frozen=True)
class CacheState:
    """The saliency of the keys in one cache.

    Attributes:
        scores: normalised, `(rows, prompt tokens so far)`; keys after them have none.
        spans: pictures and videos among those keys.
        statement: what the user said, if these scores come from the user.
        speaks: whether any key has a score; known at prefill, so that a decode step need not ask the device.
        kind: of what was said last, a key of `MANNERS`.
        tensors: strengths that were used with these scores, and their mass shifts, so that a decode step makes none.
        gates: what the gates remember of these rows; None where nobody asked.
        marks: `(rows, head_dim)` of the prompt's keys, by which a row is known again; None where there are none.
        doubt: a method of the cache that may have moved its rows in a way that is not known.
        unseen: keys in the cache when a picture or sound was first added that is not among the spans; None where all are.
        derived: what `as_usual` made, once it was asked for.
    """

    scores: TokenScores
    spans: tuple[Span, ...]
    statement: Saliency | None
    speaks: bool
    kind: str
    tensors: dict[tuple[float, ...], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    gates: Gates | None = None
    marks: Tensor | None = None
    doubt: str | None = None
    unseen: int | None = None
    derived: list[CacheState] = field(default_factory=list)

    def unseen_among(self, past: int) -> int:
        """How many of `past` keys came with or after a picture that went by while steering was off."""
        return 0 if self.unseen is None else max(0, past - self.unseen)

    @property
    def rows(self) -> int:
        return self.scores.values.shape[0]

    @property
    def length(self) -> int:
        return self.scores.values.shape[1]

    def until(self, length: int) -> CacheState:
        """The part that speaks of the first `length` keys: a cache may have been cropped or reset since."""
        if self.unseen is not None and not self.unseen_among(length):
            return dataclasses.replace(self, unseen=None).until(length)
        if self.length <= length:
            return self
        scores = self.scores.each(lambda own: own[:, :length])
        spans = tuple(span for span in self.spans if int(span.positions[-1]) < length)
        return CacheState(scores, spans, self.statement, self.speaks, self.kind, unseen=self.unseen)

    def for_rows(self, rows: int) -> CacheState:
        """Rows repeated as `generate` repeats them for beams.

        Raises:
            SaliencyError: not a multiple of the rows that are there.
        """
        if rows == self.rows:
            return self
        if rows % self.rows and not self.speaks:  # nothing was said of them, so it does not matter which they are
            return dataclasses.replace(self.select(torch.zeros(rows, dtype=torch.long)), spans=())
        if rows % self.rows:
            raise SaliencyError(f"the cache's saliency has {self.rows} rows, this call has {rows}. Start from a fresh cache.")
        return self.select(torch.arange(self.rows, device=self.scores.values.device).repeat_interleave(rows // self.rows))

    def select(self, rows: Tensor) -> CacheState:
        """Other rows, or the same in another order: what beams and selected sequences do to their cache."""
        rows = rows.to(self.scores.values.device)
        scores = self.scores.each(lambda own: own[rows])
        by_row: dict[int, list[Span]] = {}
        for span in self.spans:
            by_row.setdefault(span.row, []).append(span)
        spans = [
            dataclasses.replace(span, row=new) for new, old in enumerate(rows.tolist()) for span in by_row.get(old, ())
        ]
        tensors = {
            key: (strength, None if shift is None else shift[rows]) for key, (strength, shift) in self.tensors.items()
        }
        gates = None if self.gates is None else self.gates.select(rows)
        marks = None if self.marks is None else self.marks[rows.to(self.marks.device)]
        return dataclasses.replace(
            self, scores=scores, spans=tuple(spans), tensors=tensors, gates=gates, marks=marks, derived=[]
        )

    def as_usual(self, otherwise: float) -> CacheState:
        """With scores times the usual λ of what was said, for strengths that are left open.

        Args:
            otherwise: λ for what was said when the model was patched with another configuration, which did not leave it open.
        """
        if self.derived:
            return self.derived[0]
        usual: Tensor | float = otherwise if self.scores.usual is None else self.scores.usual
        scores = dataclasses.replace(self.scores, values=self.scores.values * usual, usual=None)
        derived = dataclasses.replace(self, scores=scores, tensors={}, derived=[])
        if not torch.compiler.is_compiling():  # a graph cannot hand out what was made in it
            self.derived.append(derived)
        return derived


def read_state(cache: Any) -> CacheState | None:
    """The state that rides on a cache, if one does.

    Raises:
        SaliencyError: the cache's rows were moved in a way that hf_steer did not see.
    """
    state: CacheState | None = getattr(cache, _ATTRIBUTE, None)
    if state is None or torch.compiler.is_compiling():
        return state
    keys = first_keys(cache)
    if state.speaks and (state.doubt is not None or getattr(cache, _SEEN, None) != stamp_of(keys)):
        state = _known_again(cache, keys, state)
    watch_rows(cache, follow_rows)
    return state


def write_state(state: CacheState, given: Any, output: Any) -> CacheState:
    """Put a state on the caches of a pass, which take its rows along from now on whenever their own rows move.

    Args:
        state: of the pass.
        given: the cache that it was called with; None without one.
        output: what it gives back, and with it perhaps other caches.

    Returns:
        The state, marked.
    """
    for cache in caches_after(given, output):
        if not torch.compiler.is_compiling():
            length = state.scores.values.shape[1]
            keys, stamp, shown = shown_keys(cache, length if state.marks is None and state.speaks else None)
            if shown and keys is not None:
                state = dataclasses.replace(state, marks=keys[:, 0, :length].detach().float().mean(1))  # see `_marks`
            setattr(cache, _SEEN, stamp)
        setattr(cache, _ATTRIBUTE, state)
        watch_rows(cache, follow_rows)
    return state


def trust_rows(cache: Any) -> None:
    """For those who exchange a cache's keys on purpose and leave its rows where they are: they are known anew from here on."""
    state: CacheState | None = getattr(cache, _ATTRIBUTE, None)
    if state is not None:
        setattr(cache, _ATTRIBUTE, dataclasses.replace(state, marks=None, doubt=None))


def note_unseen(cache: Any) -> None:
    """A picture or sound goes into a cache that carries saliency, and steering is off: from here on not all is known."""
    state: CacheState | None = getattr(cache, _ATTRIBUTE, None)
    if state is not None and not state.unseen_among(past := int(past_of(cache))):
        setattr(cache, _ATTRIBUTE, dataclasses.replace(state, unseen=past))


def _marks(keys: Tensor | None, length: int) -> Tensor | None:
    """What rows are known by; without asking the device for anything."""
    return None if keys is None or keys.shape[2] < length else keys[:, 0, :length].detach().float().mean(1)


def _known_again(cache: Any, keys: Tensor | None, state: CacheState) -> CacheState:
    """The state, where the rows are still those that it speaks of."""
    known = state.marks is not None and keys is not None and begins_with_first(cache, keys)
    marks = _marks(keys, state.length) if known else None
    same = marks is not None and state.marks is not None and marks.shape == state.marks.shape and torch.equal(marks, state.marks)
    if not same and (marks is not None or state.doubt is not None):
        how = "its keys were exchanged" if state.doubt is None else f"{type(cache).__name__}.{state.doubt}() was called"
        raise SaliencyError(
            f"the rows of a cache that carries saliency are not where they were ({how}), in a way that hf_steer does not know, so "
            "whose saliency is whose isn't known either. Start from a fresh cache, move rows by reorder_cache, "
            "batch_select_indices or batch_repeat_interleave, copy caches with copy.deepcopy, or run inside "
            "disable_steering(model)."
        )
    state = dataclasses.replace(state, doubt=None)
    setattr(cache, _ATTRIBUTE, state)
    setattr(cache, _SEEN, stamp_of(keys))
    return state


def follow_rows(cache: Any, method: str, argument: Any) -> None:
    """What rides on a cache goes where its rows went."""
    state: CacheState | None = getattr(cache, _ATTRIBUTE, None)
    if state is None:
        return
    move = ROW_MOVES.get(method)
    moved: CacheState | None
    if move == "select":
        moved = state.select(argument)
    elif move == "repeat":
        moved = state.for_rows(state.rows * argument)
    elif move == "drop":  # the keys are gone, and their saliency with them
        moved = None
    else:
        moved = dataclasses.replace(state, doubt=method)
    setattr(cache, _ATTRIBUTE, moved)
    setattr(cache, _SEEN, stamp_of(first_keys(cache)))


def join_scores(old: TokenScores, new: TokenScores) -> TokenScores:
    """New scores after old ones; `new` covers all keys, `old` the first of them. Groups stay apart."""
    length = old.values.shape[1]
    first_group = old.count_groups()
    moved = torch.where(new.group < 0, -1, new.group + first_group)
    return TokenScores(
        torch.cat([old.values, new.values[:, length:]], 1),
        torch.cat([old.group, moved[:, length:]], 1),
        None if new.groups is None else first_group + new.groups,
        None if old.usual is None or new.usual is None else torch.cat([old.usual, new.usual[:, length:]], 1),
        None if old.waits is None or new.waits is None else torch.cat([old.waits, new.waits[:, length:]], 1),
    )


def join_spans(old: tuple[Span, ...], new: tuple[Span, ...]) -> tuple[Span, ...]:
    """New pictures after old ones, counted over the whole conversation, row by row."""
    counts: dict[tuple[int, str], int] = {}
    joined = []
    for span in sorted((*old, *new), key=lambda span: (span.row, int(span.positions[0]))):
        place = (span.row, span.modality)
        joined.append(dataclasses.replace(span, index=counts.get(place, 0)))
        counts[place] = counts.get(place, 0) + 1
    return tuple(joined)
