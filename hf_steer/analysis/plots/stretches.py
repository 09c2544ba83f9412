"""Tokens of a text or moments of a sound, and how each source scores them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_steer.analysis.plots.canvas import AFTER, CONTROLS, save, subplots

_NAMED = 60
"""Stretches whose names are written."""


def plot_stretches(
    names: Sequence[str], scores: Mapping[str, Sequence[float]], path: str | os.PathLike[str], *, title: str
) -> Path:
    """A bar for each stretch, a panel for each source."""
    width = min(16.0, max(6.0, 0.18 * len(names)))
    figure, axes = subplots(len(scores), 1, size=(width, 1.2 + 1.8 * len(scores)), squeeze=False, sharex=True)
    colours = (AFTER, *CONTROLS)
    for number, (axis, (name, own)) in enumerate(zip(axes[:, 0], scores.items(), strict=True)):
        axis.bar(range(len(own)), own, width=0.9, color=colours[number % len(colours)])
        axis.set_ylabel(name, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    step = max(1, -(-len(names) // _NAMED))
    places = list(range(0, len(names), step))
    # a dollar sign would begin mathematics
    labels = [repr(names[place])[1:-1].replace("$", r"\$") for place in places]
    axes[-1, 0].set_xticks(places, labels, rotation=90, fontsize=6)
    figure.suptitle(title.replace("$", r"\$"), fontsize=9)
    return save(figure, path)
