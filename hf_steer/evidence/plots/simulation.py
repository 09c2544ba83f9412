"""The simulation's pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_steer.analysis.plots.canvas import AFTER, BEFORE, CONTROLS, save, subplots
from hf_steer.config.checks import check_count
from hf_steer.evidence.simulation import PUBLISHED, SimulationRow, steered_query


def plot_steerability(
    path: str | os.PathLike[str], *, strength: float = 0.25, seed: int = 0, tokens: int = 1024, shown: int = 128
) -> Path:
    """One query, key by key: the saliency, its attention before and after, and the logarithm of their ratio.

    Args:
        path: of the PNG.
        strength: λ.
        seed: of the draw; the query is the first of the first head of `simulate`.
        tokens: keys of the layer.
        shown: how many of them are drawn, from the first; more than about 200 are hard to read.

    Raises:
        ConfigError: as `simulate`, or `shown` is below 1.
    """
    check_count("shown", shown)
    query = steered_query(strength, seed=seed, tokens=tokens)
    keys = np.arange(min(shown, tokens))
    saliency, before, after = (values[: len(keys)].numpy() for values in (query.saliency, query.before, query.after))
    figure, (top, middle, bottom) = subplots(3, 1, size=(9, 6.2), sharex=True)
    top.bar(keys, saliency, 1.0, color=CONTROLS[0])
    top.set_ylabel("saliency s")
    middle.step(keys, before, where="mid", color=BEFORE, label="before, A")
    middle.step(keys, after, where="mid", color=AFTER, label=f"after, A' (λ = {strength:g})")
    middle.axhline(1 / tokens, color=BEFORE, linewidth=1, linestyle=":", label="uniform")
    middle.set_ylabel("attention of one query")
    middle.legend(fontsize=8, frameon=False, ncols=3, loc="upper right")
    middle.set_ylim(top=1.25 * max(before.max(), after.max()))
    smallest = np.finfo(np.float32).tiny  # a large λ leaves probabilities of 0
    bottom.bar(keys, np.log(np.maximum(after, smallest) / before), 1.0, color=AFTER)
    bottom.axhline(0, color="black", linewidth=0.8)
    bottom.set_ylabel("log(A' / A), nats")
    bottom.set_xlabel(f"key token (the first {len(keys)} of {tokens})")
    for axis in (top, middle, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
    figure.suptitle("The log ratio is λ·s, less one constant for all keys of the query", fontsize=10)
    return save(figure, path)


def plot_tradeoff(rows: Sequence[SimulationRow], path: str | os.PathLike[str]) -> Path:
    """Entropy reduction against KL, a point per strength, the published values as crosses.

    Both grow with λ², so both axes are drawn on a square-root scale, on which equal steps of λ are equally far apart.

    Args:
        rows: of `simulate`.
        path: of the PNG.
    """
    rows = sorted(rows, key=lambda row: row.strength)
    figure, axis = subplots(size=(6.4, 4.4))
    axis.set_xscale("function", functions=(_signed_root, _signed_square))
    axis.set_yscale("function", functions=(_signed_root, _signed_square))
    axis.plot(
        [row.kl_nats for row in rows], [row.entropy_reduction_percent for row in rows], "-o", color=AFTER, label="simulated"
    )
    reductions, kls = zip(*PUBLISHED.values(), strict=True)
    axis.plot(kls, reductions, "x", color="black", markersize=9, label="published (1024 tokens, 32 heads, 3 seeds)")
    for row in rows:
        axis.annotate(
            f"λ = {row.strength:g}", (row.kl_nats, row.entropy_reduction_percent),
            textcoords="offset points", xytext=(8, -9), fontsize=8,
        )
    axis.set_xlabel("KL(A ‖ A') of a query, nats (square-root scale)")
    axis.set_ylabel("entropy reduction, % (square-root scale)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.locator_params(axis="x", nbins=5)
    axis.margins(0.09)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    axis.set_title("One layer of random attention: what steering by λ gains and moves", fontsize=10)
    return save(figure, path)


def _signed_root(values: Any) -> Any:
    return np.sign(values) * np.sqrt(np.abs(values))


def _signed_square(values: Any) -> Any:
    return np.sign(values) * np.square(values)
