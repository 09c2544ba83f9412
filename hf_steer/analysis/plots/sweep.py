"""The curves of a sweep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from hf_steer.analysis.plots.canvas import AFTER, BEFORE, CONTROLS, save, subplots
from hf_steer.analysis.sweep_table import Sweep


def plot_sweep(table: Sweep, path: str | os.PathLike[str]) -> Path:
    """Strength against what it does: to the task and the answers, to the next token, and to the steered heads' attention."""
    rows = sorted(table.rows, key=lambda row: row.strength)
    strengths = [row.strength for row in rows]
    figure, ((answers, words), (focus, mass)) = subplots(2, 2, size=(9, 6.4), sharex=True)

    def curve(axis: Any, name: str, label: str, colour: str, style: str = "-o") -> None:
        values = [getattr(row, name) for row in rows]
        if None not in values:
            axis.plot(strengths, values, style, color=colour, label=label)

    _plot_task(answers, table)
    curve(answers, "answers_changed_share", "answers changed", CONTROLS[0], "--s")
    curve(answers, "tokens_changed_share", "tokens changed", CONTROLS[1], ":^")
    curve(words, "kl_nats", "next token, unsteered continuation", AFTER)
    curve(words, "attention_kl_nats", "attention, steered heads", CONTROLS[0], "--s")
    words.set_yscale("symlog", linthresh=1e-3)  # the one may be a hundredth of the other, and both begin at 0
    words.set_ylim(bottom=0)
    curve(focus, "entropy_reduction_percent", "entropy reduction", AFTER)
    curve(mass, "span_mass", "steered", AFTER)
    curve(mass, "unsteered_span_mass", "unsteered", BEFORE, ":")
    for axis, label in (
        (answers, "share or score"), (words, "KL(unsteered ‖ steered) (nats)"),
        (focus, "attention entropy reduction (%)"), (mass, "attention on the span"),
    ):  # fmt: skip
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8, frameon=False)
    for axis in (focus, mass):
        axis.set_xlabel("strength λ")
    figure.suptitle(f"{rows[0].prompts} prompts, {rows[0].provenance.model_type}, 95 % intervals over prompts", fontsize=10)
    return save(figure, path)


def _plot_task(axis: Any, table: Sweep) -> None:
    scored = [
        (row.strength, row.task_score, row.task_low, row.task_high)
        for row in sorted(table.rows, key=lambda row: row.strength)
        if row.task_score is not None
    ]
    if scored:
        strengths, score, low, high = np.array(scored, dtype=np.float64).T
        # a percentile of resampled means may be a rounding past the mean itself
        errors = np.clip([score - low, high - score], 0, None)
        axis.errorbar(strengths, score, errors, fmt="-o", color=AFTER, capsize=3, label="task score")
