"""What a gate did, over the text that it did it in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_steer.analysis.plots.canvas import AFTER, BEFORE, save, subplots
from hf_steer.errors import SteerError
from hf_steer.patching import TraceStep

_TOKENS_PER_LINE = 40


def plot_trace(steps: Sequence[TraceStep], tokens: Sequence[str], path: str | os.PathLike[str]) -> Path:
    """Entropy and effective λ of every token, the tokens written below; thinking text is shaded.

    Args:
        steps: `Trace.steps(row)`.
        tokens: the same tokens as text, such as `[tokenizer.decode(t) for t in ids]`.
        path: of the picture.

    Raises:
        SteerError: no steps, or another number of tokens.
    """
    if not steps or len(steps) != len(tokens):
        raise SteerError(f"plot_trace takes one text per step; got {len(steps)} steps and {len(tokens)} texts.")
    lines = -(-len(steps) // _TOKENS_PER_LINE)
    figure, axes = subplots(lines, 1, size=(11, 2.3 * lines + 0.6), squeeze=False)
    strongest = max(1e-9, *(abs(step.strength) for step in steps))
    for line, axis in enumerate(axes[:, 0]):
        part = slice(line * _TOKENS_PER_LINE, (line + 1) * _TOKENS_PER_LINE)
        own, texts = steps[part], tokens[part]
        places = np.arange(len(own))
        axis.bar(places, [abs(step.strength) / strongest for step in own], 0.9, color=AFTER, alpha=0.55, label="effective λ")
        axis.plot(places, [step.entropy for step in own], "-o", color="#2e4057", markersize=3, label="entropy (0 to 1)")
        for place, step in enumerate(own):
            if step.phase == "thinking":
                axis.axvspan(place - 0.5, place + 0.5, color=BEFORE, alpha=0.15, linewidth=0)
        axis.set_xticks(places, [text.replace("\n", "⏎") for text in texts], rotation=60, ha="right", fontsize=7)
        axis.set_xlim(-0.6, _TOKENS_PER_LINE - 0.4)
        axis.set_ylim(0, 1.05)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, frameon=False, loc="upper right")
    figure.suptitle(f"Gate over the text (λ up to {strongest:g}; shaded: thinking)", fontsize=10)
    return save(figure, path)
