"""Are the chosen heads better than chance? On examples that did not choose them, against random sets of as many heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_steer.analysis.heads.selection import Head, by_layer

RESAMPLES = 5000
"""Bootstrap resamples of the examples; ends of a 95 % interval are then known to about a hundredth of its width."""

Hits = Callable[[Sequence[Sequence[Head]]], Tensor]
"""Sets of heads -> `(sets, examples)` float64, 1 where the example comes out right."""


@dataclass(frozen=True)
class Estimate:
    """A mean over examples, with its bootstrap 95 % interval (percentiles)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class HeadReport:
    """The chosen heads on examples that did not choose them.

    Attributes:
        measure: `"answers"`: share whose most probable token is the answer while these heads are steered; or `"pointing"`:
            share whose most attended token, by the sum of these heads' attention, is in the span.
        examples: how many.
        chosen: share of the chosen heads.
        baseline: of the unsteered model; for pointing, of a token of the picture drawn at random.
        same_layers: share of each random set that has as many heads in each layer as the chosen one.
        all_heads: share of each random set of as many heads from anywhere.
        over_same_layers: chosen less the mean of `same_layers`, example by example; None without such sets.
        over_all_heads: chosen less the mean of `all_heads`, likewise.
        over_baseline: chosen less baseline, likewise.
    """

    measure: str
    examples: int
    chosen: Estimate
    baseline: float
    same_layers: tuple[float, ...]
    all_heads: tuple[float, ...]
    over_same_layers: Estimate | None
    over_all_heads: Estimate | None
    over_baseline: Estimate

    @property
    def reason(self) -> str | None:
        """Why the chosen heads do not stand out; None when they do."""
        if self.over_same_layers is None:
            return "all heads of the chosen layers are chosen, so there are no others to compare them with; choose fewer"
        if self.over_same_layers.low <= 0:
            reason = f"the gain over random heads of the same layers, {self.over_same_layers}, is not above 0"
            if self.over_all_heads is not None and min(self.over_all_heads.low, self.over_baseline.low) > 0:
                reason += f"; over heads from anywhere it is {self.over_all_heads}: the layers matter, not which of their heads"
            return reason
        if self.over_baseline.low <= 0:
            return f"the gain over {BASELINES[self.measure]}, {self.over_baseline}, is not above 0"
        return None


BASELINES = {"answers": "the unsteered model", "pointing": "a random token of the picture"}
"""Measure -> what `baseline` is."""


def make_report(
    measure: str,
    hits: Hits,
    baseline: Tensor,
    *,
    chosen: Sequence[Head],
    shape: tuple[int, int],
    null_sets: int,
    seed: int,
) -> HeadReport:
    """Measure the chosen heads and the random sets.

    Args:
        measure: what `hits` counts.
        hits: see `Hits`.
        baseline: `(examples,)` float64.
        chosen: the heads.
        shape: layers and heads of the model.
        null_sets: random sets of each kind; fewer where there are not so many.
        seed: of the sets and the resamples.
    """
    random = np.random.default_rng(seed)
    same = random_sets(chosen, shape, null_sets, random, same_layers=True)
    anywhere = random_sets(chosen, shape, null_sets, random, same_layers=False)
    every = hits([chosen, *same, *anywhere])
    own, near, far = every[0], every[1 : 1 + len(same)], every[1 + len(same) :]
    return HeadReport(
        measure=measure,
        examples=len(own),
        chosen=bootstrap(own, random),
        baseline=float(baseline.mean()),
        same_layers=tuple(near.mean(1).tolist()),
        all_heads=tuple(far.mean(1).tolist()),
        over_same_layers=bootstrap(own - near.mean(0), random) if len(same) else None,
        over_all_heads=bootstrap(own - far.mean(0), random) if len(anywhere) else None,
        over_baseline=bootstrap(own - baseline, random),
    )


def random_sets(
    chosen: Sequence[Head], shape: tuple[int, int], number: int, random: np.random.Generator, *, same_layers: bool
) -> list[tuple[Head, ...]]:
    """Different random sets of as many heads as are chosen, never the chosen set itself.

    Args:
        chosen: the heads.
        shape: layers and heads of the model.
        number: of sets; all that there are, where there are fewer.
        random: generator.
        same_layers: as many heads in each layer as the chosen set has there; else from anywhere.
    """
    layers, heads = shape
    everywhere = [(layer, head) for layer in range(layers) for head in range(heads)]
    pools = [(everywhere, len(chosen))]
    if same_layers:
        pools = [([(layer, head) for head in range(heads)], len(own)) for layer, own in by_layer(chosen).items()]
    possible = math.prod(math.comb(len(pool), size) for pool, size in pools) - 1
    seen = {tuple(sorted(chosen))}
    sets: list[tuple[Head, ...]] = []
    while len(sets) < min(number, possible):
        drawn = [pool[index] for pool, size in pools for index in random.choice(len(pool), size, replace=False)]
        own = tuple(sorted(drawn))
        if own not in seen:
            seen.add(own)
            sets.append(own)
    return sets


def bootstrap(values: Tensor, random: np.random.Generator) -> Estimate:
    """Mean of `(examples,)` values and its 95 % interval."""
    count = len(values)
    numbers = values.numpy()
    means = np.array([numbers[random.integers(0, count, count)].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(torch.mean(values)), float(low), float(high))
