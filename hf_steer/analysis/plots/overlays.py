"""A picture, and what each source of saliency looks at in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_steer.analysis.plots.canvas import save, subplots
from hf_steer.saliency import Saliency

if TYPE_CHECKING:
    from PIL import Image

RED = np.array([0.82, 0.29, 0.36])


def overlay_map(image: Image.Image, scores: Tensor, *, smooth: bool = False) -> np.ndarray[Any, Any]:
    """The picture with a map laid over it in red, the lowest score clear and the highest strongest.

    Args:
        image: the original picture.
        scores: `(height, width)` over the whole of it, at any resolution.
        smooth: interpolate between cells.

    Returns:
        `(height, width, 3)` in [0, 1].
    """
    mode = "bilinear" if smooth else "nearest"
    shades = torch.nn.functional.interpolate(scores[None, None].float(), size=image.size[::-1], mode=mode)[0, 0].numpy()
    spread = float(shades.max() - shades.min())
    weight = 0.6 * ((shades - shades.min()) / spread if spread > 0 else np.zeros_like(shades))[..., None]
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    return pixels * (1 - weight) + RED * weight


def overlay_saliency(image: Image.Image, saliency: Saliency, *, grid: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The picture with the first region's token scores laid over it in red: `(height, width, 3)` in [0, 1].

    Args:
        image: the original picture.
        saliency: with at least one region.
        grid: height and width in tokens.
    """
    paint: Any = saliency.regions[0].paint
    scores = paint.on_grid(*grid)
    shades = torch.nn.functional.interpolate(scores[None, None], size=image.size[::-1], mode="nearest")[0, 0].numpy()
    shades = shades / max(float(shades.max()), 1e-12)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    weight = 0.45 * shades[..., None]
    return pixels * (1 - weight) + RED * weight


def plot_overlays(image: Image.Image, maps: Mapping[str, Tensor], path: str | os.PathLike[str], *, title: str) -> Path:
    """The picture, then one overlay per source, each scaled by itself."""
    columns = min(4, len(maps) + 1)
    rows = -(-(len(maps) + 1) // columns)
    figure, axes = subplots(rows, columns, size=(3 * columns, 3.2 * rows), squeeze=False)
    panels = [("picture", np.asarray(image)), *((name, overlay_map(image, own)) for name, own in maps.items())]
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, pixels) in zip(axes.flat, panels, strict=False):
        axis.imshow(pixels)
        axis.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=10)
    return save(figure, path)
