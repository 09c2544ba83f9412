"""Resampling of boxes, maps and points in the original picture to a grid of tokens.

The processors of all families here resize the whole picture onto the whole grid, so a position is a fraction of each side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.errors import SaliencyError

DEFAULT_RADIUS_FRACTION = 1 / 16


class Paint(Protocol):
    """Something that can be laid onto a grid of tokens."""

    def on_grid(self, height: int, width: int) -> Tensor:
        """`(height, width)` float32 scores of the tokens."""


@dataclass(frozen=True)
class Boxes:
    """`(left, top, right, bottom)` in fractions of the sides; a token scores the share of it that they cover at most."""

    fractions: tuple[tuple[float, float, float, float], ...]

    def on_grid(self, height: int, width: int) -> Tensor:
        covered = torch.zeros(height, width, dtype=torch.float32)
        for left, top, right, bottom in self.fractions:
            share = _covered(top, bottom, height)[:, None] * _covered(left, right, width)[None, :]
            covered = torch.maximum(covered, share)
        return covered


@dataclass(frozen=True, eq=False)
class Picture:
    """`(height, width)` scores at any resolution: averaged where the grid is coarser, interpolated where it is finer."""

    values: Tensor

    def on_grid(self, height: int, width: int) -> Tensor:
        image = self.values[None, None]
        if height <= image.shape[2] and width <= image.shape[3]:
            return F.interpolate(image, size=(height, width), mode="area")[0, 0]
        return F.interpolate(image, size=(height, width), mode="bilinear", antialias=True)[0, 0]


@dataclass(frozen=True)
class Points:
    """Gaussian spots: `(x, y)` in fractions of the sides, standard deviations `(x, y)` likewise."""

    fractions: tuple[tuple[float, float], ...]
    radii: tuple[float, float]

    def on_grid(self, height: int, width: int) -> Tensor:
        x = (torch.arange(width, dtype=torch.float32) + 0.5) / width
        y = (torch.arange(height, dtype=torch.float32) + 0.5) / height
        radius_x, radius_y = max(self.radii[0], 0.5 / width), max(self.radii[1], 0.5 / height)
        spots = [
            torch.exp(-0.5 * (((y - centre_y) / radius_y) ** 2)[:, None] - 0.5 * (((x - centre_x) / radius_x) ** 2)[None, :])
            for centre_x, centre_y in self.fractions
        ]
        return torch.stack(spots).amax(0)


def box_fractions(boxes: Any, image_size: Any) -> tuple[tuple[float, float, float, float], ...]:
    """Boxes in pixels as fractions of the sides; SaliencyError for one that is empty or reaches outside."""
    width, height = _size(image_size)
    fractions = []
    for box in _several(boxes, 4, "box", "(left, top, right, bottom)"):
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise SaliencyError(
                f"box {tuple(box)} is empty or outside the picture of {width:g} x {height:g} pixels; boxes are "
                "(left, top, right, bottom) in pixels of the original picture."
            )
        fractions.append((left / width, top / height, right / width, bottom / height))
    return tuple(fractions)


def point_fractions(
    points: Any, image_size: Any, radius_px: float | None
) -> tuple[tuple[tuple[float, float], ...], tuple[float, float]]:
    """Points and radius in pixels as fractions of the sides; SaliencyError for one outside."""
    width, height = _size(image_size)
    radius = max(width, height) * DEFAULT_RADIUS_FRACTION if radius_px is None else float(radius_px)
    if not (math.isfinite(radius) and radius > 0):
        raise SaliencyError(f"radius_px must be above 0; got {radius_px}.")
    fractions = []
    for x, y in _several(points, 2, "point", "(x, y)"):
        if not (0 <= x <= width and 0 <= y <= height):
            raise SaliencyError(f"point ({x:g}, {y:g}) is outside the picture of {width:g} x {height:g} pixels.")
        fractions.append((x / width, y / height))
    return tuple(fractions), (radius / width, radius / height)


def _covered(start: float, end: float, cells: int) -> Tensor:
    """`(cells,)` share of each cell of the unit interval that `start` to `end` covers."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    overlap = torch.clamp(edges[1:], max=end) - torch.clamp(edges[:-1], min=start)
    return (overlap.clamp(min=0) * cells).to(torch.float32)


def _size(image_size: Any) -> tuple[float, float]:
    size = getattr(image_size, "size", None)
    try:
        width, height = size if isinstance(size, tuple) else image_size
        sides = float(width), float(height)
    except (TypeError, ValueError) as error:
        raise SaliencyError(f"image_size must be (width, height) in pixels or a PIL picture; got {image_size!r}.") from error
    if not (sides[0] > 0 and sides[1] > 0):
        raise SaliencyError(f"image_size must be (width, height) in pixels, both above 0; got {sides}.")
    return sides


def _several(values: Any, length: int, noun: str, form: str) -> Sequence[Sequence[float]]:
    """One or several tuples of finite numbers."""
    try:
        table = torch.as_tensor(np.atleast_2d(np.asarray(values, dtype=np.float64)))
        table = table.view(len(table), length)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SaliencyError(f"a {noun} is {form}; got {values!r}.") from error
    if not len(table) or not torch.isfinite(table).all():
        raise SaliencyError(f"there must be at least one {noun}, and all must be finite; got {values!r}.")
    rows: list[list[float]] = table.tolist()
    return rows
