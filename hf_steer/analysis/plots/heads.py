"""Grounding heads: every score of every head, and the chosen set beside random ones."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from hf_steer.analysis.heads import HeadResult
from hf_steer.analysis.heads.report import BASELINES
from hf_steer.analysis.plots.canvas import AFTER, BEFORE, CONTROLS, save, subplots

_COLUMNS = 3
_JITTER_SEED = 0
_SHARE_OF = {"answers": "right answers", "pointing": "most attended token in the span"}


def plot_heads(result: HeadResult, path: str | os.PathLike[str]) -> Path:
    """A heat map per score, layers down and heads across, the chosen heads outlined; and the report: chosen set and random sets.

    Returns:
        The path.
    """
    panels = len(result.scores) + 1
    rows = -(-panels // _COLUMNS)
    figure, axes = subplots(rows, _COLUMNS, size=(10.5, 2.9 * rows), squeeze=False)
    cells = list(axes.flat)
    for axis, (name, table) in zip(cells, result.scores.items(), strict=False):
        _plot_score(figure, axis, name, np.array(table, dtype=np.float64), result)
    _plot_report(cells[panels - 1], result)
    for axis in cells[panels:]:
        axis.set_axis_off()
    title = f"Heads chosen by {result.rule!r} on {result.examples} examples (outlined). Verdict: {result.verdict}"
    figure.suptitle(textwrap.fill(title, 110), fontsize=10)
    return save(figure, path)


def _plot_score(figure: Any, axis: Any, name: str, table: np.ndarray[Any, Any], result: HeadResult) -> None:
    from matplotlib.patches import Rectangle

    low_is_good = name == "entropy"
    shades = axis.imshow(np.ma.masked_invalid(table), cmap="viridis_r" if low_is_good else "viridis", aspect="auto")
    axis.set_facecolor("#d9d9d9")  # heads that were not tried
    for layer, head in result.chosen:
        axis.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=AFTER, linewidth=2))
    axis.set_title(f"{name} (low is compact)" if low_is_good else name, fontsize=9)
    axis.set_xlabel("head", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(shades, ax=axis, shrink=0.9)


def _plot_report(axis: Any, result: HeadResult) -> None:
    report, random = result.report, np.random.default_rng(_JITTER_SEED)
    nulls = (("random,\nsame layers", report.same_layers, CONTROLS[0]), ("random,\nanywhere", report.all_heads, CONTROLS[1]))
    chosen = report.chosen
    errors = np.clip([[chosen.value - chosen.low], [chosen.high - chosen.value]], 0, None)
    axis.errorbar([0], [chosen.value], errors, fmt="o", color=AFTER, capsize=4)
    for place, (_, shares, colour) in enumerate(nulls, 1):
        if shares:
            axis.scatter(place + random.uniform(-0.12, 0.12, len(shares)), shares, s=12, color=colour, alpha=0.7)
            axis.hlines(np.mean(shares), place - 0.25, place + 0.25, color=colour)
    axis.axhline(report.baseline, color=BEFORE, linewidth=1, linestyle=":", label=BASELINES[report.measure])
    axis.set_xticks(range(3), ["chosen", *(name for name, _, _ in nulls)], fontsize=8)
    axis.set_xlim(-0.5, 2.5)
    axis.set_ylim(-0.02, 1.02)
    axis.set_title(f"{_SHARE_OF[report.measure]}, {report.examples} other examples", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
