"""The largest value that keeps a budget, in few measurements: bracketed, then approached along what was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from hf_steer.errors import ConfigError

_FIRST = 1.0
"""Value with which a search begins."""
_SMALLEST = 2.0**-24
"""Share of the largest value below which it takes 0."""
_STEP = 8.0
"""By what a value grows or shrinks at most while there is no bracket."""
_INSIDE = 0.05
"""Share of a bracket that a new value stays away from its ends."""


@dataclass(frozen=True)
class Found:
    """Where a search ended: a value that was measured to keep the budget, and whether it is the largest that was allowed."""

    value: float
    kl_nats: float
    largest_kept: bool
    monotone: bool


def search(
    measure: Callable[[float], float], budget_nats: float, *, largest: float, tolerance: float, most: int
) -> Found:
    """Bracket the budget, beginning at 1, and approach it.

    A divergence grows about as the square of a small value, so on a double logarithmic scale little is missed by a line. Where the
    line fails, the bracket is halved.

    Args:
        measure: value -> KL in nats; what is not a number exceeds every budget.
        budget_nats: to keep.
        largest: value that is not exceeded.
        tolerance: relative distance between the value that is found and the next measured one, at which the search ends.
        most: measurements, after which it ends with what it has.

    Raises:
        ConfigError: not even 0 keeps the budget.
    """
    bracket = _Bracket(budget_nats, largest, tolerance)
    value = min(_FIRST, largest)
    while True:
        bracket.add(value, measure(value))
        if bracket.is_closed() or len(bracket.measured) >= most:
            break
        value = bracket.next_value()
    if bracket.kept == 0:
        bracket.add(0.0, measure(0.0))
        if not bracket.measured[0.0] <= budget_nats:
            raise ConfigError(
                f"budget_nats={budget_nats:g} is below the noise of this model: without any steering, two passes differ by "
                f"{bracket.measured[0.0]:g} nats. Give a larger budget."
            )
    curve = [bracket.measured[own] for own in sorted(bracket.measured)]
    monotone = all(one <= other for one, other in itertools.pairwise(curve))
    return Found(bracket.kept, bracket.measured[bracket.kept], bracket.kept == largest, monotone)


class _Bracket:
    """What was measured, and between which values the budget lies."""

    def __init__(self, budget: float, largest: float, tolerance: float) -> None:
        self.budget, self.largest, self.tolerance = budget, largest, tolerance
        self.measured: dict[float, float] = {}
        self.kept, self.exceeded = 0.0, math.inf
        self._gap, self._slow = math.inf, False

    def add(self, value: float, kl: float) -> None:
        self.measured[value] = kl
        if kl <= self.budget:
            self.kept = max(self.kept, value)
        else:
            self.exceeded = min(self.exceeded, value)
        gap = math.log(self.exceeded / self.kept) if self.kept and self.exceeded < math.inf else math.inf
        self._slow = gap > self._gap / 2
        self._gap = gap

    def is_closed(self) -> bool:
        near = self.exceeded - self.kept <= self.tolerance * self.exceeded
        return self.kept >= self.largest or (self.exceeded < math.inf and near) or self.exceeded <= _SMALLEST * self.largest

    def next_value(self) -> float:
        if self.exceeded == math.inf:
            factor = math.sqrt(self.budget / self.measured[self.kept]) if self.measured[self.kept] > 0 else _STEP
            least = 1.2 if len(self.measured) == 1 else 2.0
            return min(self.kept * min(max(factor * (1 + self.tolerance / 2), least), _STEP), self.largest)
        if not self.kept:
            over = self.measured[self.exceeded] / self.budget
            again = sum(kl > self.budget for kl in self.measured.values()) > 2  # it falls less than a square does
            factor = 1 / math.sqrt(over) if math.isfinite(over) and not again else 1 / _STEP
            return self.exceeded * min(max(factor * (1 - self.tolerance / 2), 1 / _STEP), 0.8)
        low, high = self.measured[self.kept], self.measured[self.exceeded]
        middle = math.sqrt(self.kept * self.exceeded)
        if self._slow or not low > 0 or not math.isfinite(high):
            self._slow = False
            return middle
        share = math.log(self.budget / low) / math.log(high / low) if high > low else 0.5
        aimed: float = self.kept * (self.exceeded / self.kept) ** share
        # a little beyond where the budget should be: on the side that is farther away, so that it is caught between two values
        aimed *= 1 - self.tolerance / 3 if share > 0.5 else 1 + self.tolerance / 3
        edge = _INSIDE * (self.exceeded - self.kept)
        return min(max(aimed, self.kept + edge), self.exceeded - edge)
