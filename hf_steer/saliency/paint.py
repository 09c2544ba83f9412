"""Boxes, maps, points and stretches of time, laid onto the tokens of a picture or sound.

Each knows two kinds of tokens: a regular grid over the whole picture, and single cells wherever they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Paint(Protocol):
    """Something that can be laid onto the tokens of a picture."""

    def on_grid(self, height: int, width: int) -> Tensor:
        """`(height, width)` float32 scores of the tokens of a grid over the whole picture."""

    def on_cells(self, cells: Tensor) -> Tensor:
        """`(tokens,)` float32 scores of cells `(tokens, 4)`: left, top, right, bottom in fractions of the sides."""

    def misses(self, shown: Tensor) -> bool:
        """Whether any of it lies outside `(4,)`, the part of the picture that the cells show."""


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

    def on_cells(self, cells: Tensor) -> Tensor:
        boxes = torch.tensor(self.fractions, dtype=torch.float64)
        shares = _shares(cells[:, 0::2], boxes[:, 0::2]) * _shares(cells[:, 1::2], boxes[:, 1::2])
        return shares.amax(1).to(torch.float32)

    def misses(self, shown: Tensor) -> bool:
        left, top, right, bottom = shown.tolist()
        return any(box[0] >= right or box[1] >= bottom or box[2] <= left or box[3] <= top for box in self.fractions)


@dataclass(frozen=True, eq=False)
class Picture:
    """`(height, width)` scores at any resolution. On a grid they are averaged where that is coarser and interpolated where it is
    finer; a cell gets their mean over its area."""

    values: Tensor

    def on_grid(self, height: int, width: int) -> Tensor:
        image = self.values[None, None]
        if height <= image.shape[2] and width <= image.shape[3]:
            return F.interpolate(image, size=(height, width), mode="area")[0, 0]
        return F.interpolate(image, size=(height, width), mode="bilinear", antialias=True)[0, 0]

    def on_cells(self, cells: Tensor) -> Tensor:
        height, width = self.values.shape
        # a map has few rows and columns of cells, though many cells; sums of shares keep equal cells equal and silence silent
        rows, row_of = torch.unique(cells[:, 1::2], dim=0, return_inverse=True)
        columns, column_of = torch.unique(cells[:, 0::2], dim=0, return_inverse=True)
        means = _shares(rows, _edges(height)) @ self.values.double() @ _shares(columns, _edges(width)).T
        return means[row_of, column_of].to(torch.float32)

    def misses(self, shown: Tensor) -> bool:
        return bool(self.values.any()) and not self.on_cells(shown[None]).any()


@dataclass(frozen=True)
class Points:
    """Gaussian spots: `(x, y)` in fractions of the sides, standard deviations `(x, y)` likewise, but at least half a token."""

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

    def on_cells(self, cells: Tensor) -> Tensor:
        centres, halves = (cells[:, :2] + cells[:, 2:]) / 2, (cells[:, 2:] - cells[:, :2]) / 2
        radii = torch.maximum(halves, torch.tensor(self.radii, dtype=torch.float64))
        away = (centres[:, None] - torch.tensor(self.fractions, dtype=torch.float64)) / radii[:, None]
        return torch.exp(-0.5 * away.square().sum(-1)).amax(1).to(torch.float32)

    def misses(self, shown: Tensor) -> bool:
        left, top, right, bottom = shown.tolist()
        return not all(left <= x <= right and top <= y <= bottom for x, y in self.fractions)


@dataclass(frozen=True)
class Stretches:
    """Stretches of a sound, `(start, end)` in seconds, sorted and apart; a token scores the share of it that they cover.

    Attributes:
        spans: the stretches.
        duration: of the sound, as far as the user says.
    """

    spans: tuple[tuple[float, float], ...]
    duration: float | None

    def on_cells(self, cells: Tensor) -> Tensor:
        return _shares(cells, torch.tensor(self.spans, dtype=torch.float64)).sum(1).to(torch.float32)


def _covered(start: float, end: float, cells: int) -> Tensor:
    """`(cells,)` share of each cell of the unit interval that `start` to `end` covers."""
    stretch = torch.tensor([[start, end]], dtype=torch.float64)
    return _shares(_edges(cells), stretch)[:, 0].to(torch.float32)


def _edges(cells: int) -> Tensor:
    """`(cells, 2)` starts and ends of equal cells of the unit interval."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    return torch.stack([edges[:-1], edges[1:]], 1)


def _shares(cells: Tensor, stretches: Tensor) -> Tensor:
    """`(cells, stretches)` share of each cell `(start, end)` that each stretch `(start, end)` covers."""
    start = torch.maximum(cells[:, None, 0], stretches[None, :, 0])
    end = torch.minimum(cells[:, None, 1], stretches[None, :, 1])
    return (end - start).clamp(min=0) / (cells[:, 1] - cells[:, 0])[:, None]
