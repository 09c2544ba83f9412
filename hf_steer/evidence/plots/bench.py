"""The benchmark: how many times the plain model's time each contender takes, its bars as ticks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_steer.analysis.plots.canvas import AFTER, BEFORE, CONTROLS, save, subplots

_PANELS = ("prefill", "decode")
_LEVELS = ("attention", "layer", "model")
_MARKERS = {"attention": "o", "layer": "s", "model": "^"}
_COLOURS = {"hf_steer": AFTER, "hf_steer disabled": BEFORE, "hf_steer strength 0": BEFORE}
_LIMIT = re.compile(r"\bratio <= ([0-9.]+)")


def plot_bench(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Prefill left, decode right; a line per level and contender, a point with its interval per cell, short ticks for bars.

    Args:
        rows: of `hf_steer.evidence.bench.run_bench`.
        path: of the PNG.
    """
    shown = [row for row in rows if row["phase"] in _PANELS and row["contender"] != "plain"]
    by_level = sorted(shown, key=lambda row: _LEVELS.index(row["level"]))
    places = list(dict.fromkeys((row["level"], row["contender"]) for row in by_level))
    figure, axes = subplots(1, 2, size=(12, max(2.5, 0.27 * len(places) + 1.4)), sharey=True)
    from matplotlib.ticker import LogLocator  # after `subplots`, which says how to install it

    for axis, phase in zip(axes, _PANELS, strict=True):
        for place, (level, contender) in enumerate(places):
            chosen = [row for row in shown if (row["phase"], row["level"], row["contender"]) == (phase, level, contender)]
            _draw_line(axis, place, level, contender, chosen)
        axis.axvline(1.0, color=BEFORE, linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel("times the plain model's time (log scale)")
        axis.set_title(phase, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(LogLocator(subs=(1.2, 1.5, 2, 3, 5, 7)))
        axis.xaxis.set_minor_formatter("{x:.2g}")
        axis.tick_params(axis="x", which="both", labelsize=7)
    axes[0].set_yticks(range(len(places)), [f"{contender}, {level}" for level, contender in places], fontsize=8)
    axes[0].invert_yaxis()
    if rows:
        first = rows[0]
        lengths = sorted({row["tokens"] for row in shown})
        figure.suptitle(
            f"{first['device']}, {first['threads']} thread(s), torch {first['torch']}, {first['date']}. {_span(lengths)} tokens; "
            "a point per shape, length, type and batch; ticks are the bars",
            fontsize=9,
        )
    return save(figure, path)


def _draw_line(axis: Any, place: int, level: str, contender: str, rows: Sequence[dict[str, Any]]) -> None:
    """The cells of one contender, spread a little so that their intervals can be told apart."""
    if not rows:
        return
    heights = place + (np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else np.zeros(1))
    middle, low, high = (np.array([row[name] for row in rows]) for name in ("ratio", "ratio_p20", "ratio_p80"))
    colour = _COLOURS.get(contender, CONTROLS[1] if contender.startswith("hf_steer") else CONTROLS[0])
    axis.errorbar(
        middle, heights, xerr=[np.clip(middle - low, 0, None), np.clip(high - middle, 0, None)], fmt=_MARKERS[level],
        markersize=3, linewidth=0.8, color=colour,
    )  # fmt: skip
    for limit in {float(found[1]) for row in rows if (found := _LIMIT.search(row["bar"]))}:
        axis.vlines(limit, place - 0.4, place + 0.4, color="black", linewidth=1.2)


def _span(lengths: Sequence[int]) -> str:
    return "no" if not lengths else str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
