"""The demo's pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from hf_steer.analysis.plots.canvas import AFTER, BEFORE, CONTROLS, save, subplots
from hf_steer.analysis.plots.overlays import overlay_saliency
from hf_steer.evidence.pointing import Example, PointingResult
from hf_steer.saliency import Saliency


def plot_examples(result: PointingResult, path: str | os.PathLike[str]) -> Path:
    """A row per scene: the picture, where it was told to look, and the answer's probabilities before and after."""
    count = len(result.examples)
    figure, axes = subplots(count, 3, size=(9, 2.7 * count), width_ratios=(1, 1, 2), squeeze=False)
    for row, example in zip(axes, result.examples, strict=True):
        _plot_example(row, example, result.best_strength)
    figure.suptitle(f"The same picture and question, unsteered and steered (λ = {result.best_strength:g}, all heads)")
    return save(figure, path)


def _plot_example(row: Any, example: Example, strength: float) -> None:
    picture, overlay, chart = row
    picture.imshow(example.scene.image)
    picture.set_title(example.question, fontsize=9)
    saliency = Saliency.from_boxes(example.scene.boxes[example.cell], example.scene.image)
    overlay.imshow(overlay_saliency(example.scene.image, saliency, grid=(2, 2)))
    overlay.set_title("look here", fontsize=9)
    for axis in (picture, overlay):
        axis.set_xticks([])
        axis.set_yticks([])
    digits = np.arange(10)
    chart.bar(digits - 0.2, example.before, 0.4, color=BEFORE, label=f"unsteered: {_answer(example.answer_before)}")
    chart.bar(digits + 0.2, example.after, 0.4, color=AFTER, label=f"λ = {strength:g}: {_answer(example.answer_after)}")
    chart.set_xticks(digits)
    chart.set_ylim(0, 1.05)
    chart.set_ylabel("probability of the answer", fontsize=8)
    chart.legend(fontsize=8, frameon=False)
    chart.spines[["top", "right"]].set_visible(False)


def plot_strength(result: PointingResult, path: str | os.PathLike[str]) -> Path:
    """Strength against the share that names the pointed-at digit, with 95 % intervals, the controls beside it."""
    figure, axis = subplots(size=(6.2, 3.8))
    curve = [row for row in result.rows if row.saliency in ("nothing", "pointed-at cell")]
    controls = result.rows[len(curve) :]
    for rows, colour, label, style, aside in (
        (curve, AFTER, "saliency on the pointed-at cell", "-o", 0.0),
        *(
            ([row], colour, row.saliency, marker, 0.12 * (place + 1))
            for place, (row, colour, marker) in enumerate(zip(controls, CONTROLS, "sDv^", strict=True))
        ),
    ):
        share = np.array([row.pointed_share for row in rows])
        # rounding may put an end of the interval past the share itself
        errors = np.clip([share - [row.low for row in rows], [row.high for row in rows] - share], 0, None)
        axis.errorbar([row.strength + aside for row in rows], share, errors, fmt=style, color=colour, capsize=3, label=label)
    axis.axhline(0.25, color=BEFORE, linewidth=1, linestyle=":", label="one digit of four at random")
    axis.set_xlabel("strength λ")
    axis.set_ylabel("answers that name the pointed-at digit")
    axis.set_ylim(-0.02, 1.02)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center right")
    axis.set_title(f"Held-out digits, {curve[0].scenes} scenes, 95 % intervals", fontsize=10)
    return save(figure, path)


def _answer(text: str) -> str:
    return text.rsplit("</think>", 1)[-1].strip() or "(nothing)"
