"""Calls timed in turns, and the memory that each takes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

FLOOR = "plain"
_SLOW, _VERY_SLOW, _LONG_MS = 2.0, 4.0, 1000.0
"""A contender `_SLOW` times slower than the floor is timed in the first rounds only, since its ratio is no close matter; one that
is `_VERY_SLOW` and takes longer than `_LONG_MS` in the first alone."""

Times = Mapping[str, list[float]]


@dataclass(frozen=True)
class Call:
    """What a contender runs.

    Attributes:
        run: one call; returns what is verified: tensors.
        around: a context that is entered before the clock starts and left after it stops.
        held_bytes: of what was made for the prompt before the clock starts, such as a mask; counts as memory.
    """

    run: Callable[[], tuple[Any, ...]]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    held_bytes: int = 0

    def result(self) -> tuple[Any, ...]:
        """Run once without a clock."""
        with self.around():
            return self.run()


@dataclass(frozen=True)
class Spread:
    """Median, and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def spread(values: list[float]) -> Spread:
    """Of at least one number."""
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8))
    return Spread(float(middle), float(low), float(high))


def paired_ratios(times: Times, name: str, floor: str = FLOOR) -> list[float]:
    """Contender over floor, round by round, over the rounds that both ran."""
    return [mine / base for mine, base in zip(times[name], times[floor], strict=False)]


def cpu_clock(call: Call) -> float:
    """Milliseconds of one run."""
    with call.around():
        started = time.perf_counter()
        call.run()
        return 1e3 * (time.perf_counter() - started)


def cuda_clock(call: Call) -> float:
    """Milliseconds of one run between two events on an idle GPU, the launches included."""
    with call.around():
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begun.record()
        call.run()
        ended.record()
        torch.cuda.synchronize()
        return float(begun.elapsed_time(ended))


def time_in_turns(
    calls: Mapping[str, Call],
    clock: Callable[[Call], float],
    *,
    seconds: float,
    least_rounds: int = 3,
    most_rounds: int = 400,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Every contender once a round, in an order of its own each time, so that none always follows the same other.

    Args:
        calls: name -> call; the floor is one of them. All have run before.
        clock: milliseconds of one call.
        seconds: no round begins after this time, but for the first ones.
        least_rounds: that run whatever the time; slow contenders run in these alone, or in fewer.
        most_rounds: at most.
        now: seconds, for the budget.

    Returns:
        Name -> milliseconds, one number per round from the first.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, started = list(calls), now()
    for number in range(most_rounds):
        if number in (1, least_rounds):
            limit = _SLOW * np.median(times[FLOOR]) if number == least_rounds else max(_VERY_SLOW * times[FLOOR][0], _LONG_MS)
            names = [name for name in names if np.median(times[name]) <= limit]
        if number >= least_rounds and now() - started > seconds:
            break
        for name in random.Random(number).sample(names, len(names)):
            times[name].append(clock(calls[name]))
    return times


def peak_bytes(call: Call, device: str) -> int:
    """Highest memory during a call above what was there before, and what is held for it."""
    with call.around():
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call.run()
            torch.cuda.synchronize()
            return int(torch.cuda.max_memory_allocated() - before) + call.held_bytes
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
            call.run()
    return _highest(watched) + call.held_bytes


def _highest(watched: Any) -> int:
    held = peak = 0
    for event in sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
