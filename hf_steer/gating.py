"""When to steer: from the tokens so far and the last next-token distribution to a gate per row and query. Pure tensors.

Everything has a fixed shape per row, so that rows can follow beams, and nothing asks the device for a number.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_steer.config import GateConfig
from hf_steer.config.options import own_options

_ANY = -1
_LONG_AGO = 1 << 30
_WARM_UP = 4
"""Distributions that a row's running mean needs before a z-score against it means something."""


@dataclass(frozen=True)
class Patterns:
    """Token sequences to watch for.

    Attributes:
        opening: of the thinking text.
        closing: likewise.
        phrases: that open a gate which reads.
    """

    opening: tuple[tuple[int, ...], ...] = ()
    closing: tuple[tuple[int, ...], ...] = ()
    phrases: tuple[tuple[int, ...], ...] = ()
    tables: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def longest(self) -> int:
        return max(map(len, (*self.opening, *self.closing, *self.phrases)), default=1)

    def table(self, device: torch.device) -> Tensor:
        """`(patterns, longest)`, aligned to the right; made once per device."""
        if device not in self.tables:
            rows = [[_ANY] * (self.longest - len(p)) + list(p) for p in (*self.opening, *self.closing, *self.phrases)]
            self.tables[device] = torch.tensor(rows, dtype=torch.long, device=device).view(len(rows), self.longest)
        return self.tables[device]


@dataclass(frozen=True)
class GateState:
    """What a gate remembers of each row.

    Attributes:
        tail: `(rows, longest - 1)` last tokens; -2 where there are none.
        thinking: `(rows,)` bool: inside the thinking text.
        age: `(rows,)` tokens since the last phrase ended.
        opened: `(rows,)` bool: the hysteresis.
        value: `(rows,)` in [0, 1], from the last distribution.
        count: `(rows,)` distributions seen.
        mean: `(rows,)` of what was measured of them.
        squares: `(rows,)` sum of squared distances from the mean.
    """

    tail: Tensor
    thinking: Tensor
    age: Tensor
    opened: Tensor
    value: Tensor
    count: Tensor
    mean: Tensor
    squares: Tensor

    def select(self, rows: Tensor) -> GateState:
        """Other rows, or the same in another order."""
        named = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return GateState(**{name: value[rows] for name, value in named.items()})


@dataclass(frozen=True)
class Track:
    """Think tags and phrases, followed through the tokens of one pass.

    Attributes:
        thinking: `(rows, queries)` bool: out of this query a token of the thinking text is generated.
        age: `(rows, queries)` tokens since the last phrase ended.
        window: `(rows, longest - 1 + queries)` tokens, what came before included.
    """

    thinking: Tensor
    age: Tensor
    window: Tensor


def fresh_state(rows: int, patterns: Patterns, gate: GateConfig | None, device: torch.device) -> GateState:
    """Nothing read, nothing measured."""
    zeros = torch.zeros(rows, dtype=torch.float32, device=device)
    return GateState(
        tail=torch.full((rows, patterns.longest - 1), -2, dtype=torch.long, device=device),
        thinking=zeros.bool(),
        age=torch.full((rows,), _LONG_AGO, dtype=torch.long, device=device),
        opened=zeros.bool(),
        value=zeros + (0.0 if gate is None else gate.initial),
        count=zeros,
        mean=zeros,
        squares=zeros,
    )


def read_tokens(state: GateState, tokens: Tensor, patterns: Patterns, *, said: Tensor | None = None) -> Track:
    """Follow the think tags and the phrases through the tokens of one pass.

    Args:
        state: before these tokens.
        tokens: `(rows, queries)`; negative where there is padding.
        patterns: what to watch for.
        said: `(rows, queries)` bool, where a phrase counts; everywhere when None. It has to end in thinking text, too.
    """
    queries, longest = tokens.shape[1], patterns.longest
    window = torch.cat([state.tail, tokens], 1)
    table = patterns.table(tokens.device)
    runs = window.unfold(1, longest, 1)[:, :, None, :]
    hits = ((runs == table) | (table == _ANY)).all(-1)
    opening, closing, phrases = hits.split([len(patterns.opening), len(patterns.closing), len(patterns.phrases)], -1)
    number = torch.arange(1, queries + 1, device=tokens.device)
    opened, closed = (_last(number, hit.any(-1)) for hit in (opening, closing))
    thinking = torch.where(opened == closed, state.thinking[:, None], opened > closed)
    counted = phrases.any(-1) & thinking
    heard = _last(number, counted if said is None else counted & said)
    age = torch.where(heard > 0, number - heard, state.age[:, None] + number)
    return Track(thinking, age, window)


def _last(number: Tensor, hit: Tensor) -> Tensor:
    """Up to each query, the number of the last hit; 0 before the first."""
    return torch.where(hit, number, 0).cummax(1).values


def state_after(state: GateState, track: Track, column: Tensor) -> GateState:
    """The state after a query of the pass, `column` `(rows,)`; what was measured is still that of before."""
    longest = state.tail.shape[1] + 1
    places = column[:, None] + torch.arange(1, longest, device=column.device)
    chosen = column[:, None]
    return dataclasses.replace(
        state,
        tail=track.window.gather(1, places),
        thinking=track.thinking.gather(1, chosen)[:, 0],
        age=track.age.gather(1, chosen)[:, 0],
    )


def observe(state: GateState, logits: Tensor, gate: GateConfig) -> GateState:
    """Measure the distribution `(rows, vocabulary)` that a pass ended in; the next query's gate comes from it."""
    row = gate.row
    if row.measures is None:
        return state
    measured = row.measures(logits, **own_options(gate))
    opens, closes, level = float(gate.threshold or 0), float(gate.release or 0), measured
    if gate.zscore:
        spread = (state.squares / state.count.clamp(min=1)).sqrt()
        known = (state.count >= _WARM_UP) & (spread > 0)
        unknown = torch.inf if row.falls else -torch.inf
        level = torch.where(known, (measured - state.mean) / spread.clamp(min=torch.finfo(spread.dtype).tiny), unknown)
    if row.falls:
        opens, closes, level = -opens, -closes, -level
    opened = (level >= opens) | (state.opened & (level >= closes))
    value = opened.float() if not gate.soft else ((level - closes) / (opens - closes)).clamp(0, 1)
    count = state.count + 1
    mean = state.mean + (measured - state.mean) / count
    squares = state.squares + (measured - state.mean) * (measured - mean)
    return dataclasses.replace(state, opened=opened, value=value, count=count, mean=mean, squares=squares)


def gate_of(state: GateState, track: Track | None, gate: GateConfig, *, generated: Tensor) -> Tensor:
    """`(rows, queries)` in [0, 1]: how far each query's gate is open.

    Args:
        state: before the pass.
        track: through its tokens; only a gate that reads needs it.
        gate: which.
        generated: `(rows, queries)` bool; other queries get `initial`.
    """
    reads = gate.row.reads
    if reads is None:
        value = state.value[:, None]
    else:
        if track is None:
            raise ValueError(f"a {gate.kind!r} gate reads tokens, and none came")
        value = reads(track, gate)
    return torch.where(generated, value, gate.initial)
