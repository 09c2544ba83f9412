"""Scribbles: lines with a width and round ends, laid onto the tokens of a picture by the area that they cover.

A thick stretch from one point to the next is convex, so a row of the picture crosses it in one interval. The union of a row's
intervals is exact, and rows are integrated by Gauss's rule between all heights at which a line's outline turns. What is left is
less than a thousandth of a token, where an outline leaves one sideways or lines cross within it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_GAUSS = [torch.from_numpy(own) * (np.pi / 2) for own in np.polynomial.legendre.leggauss(8)]
_NODES, _WEIGHTS = _GAUSS[0].sin(), _GAUSS[1] * _GAUSS[0].cos()
"""Of the integral from -1 to 1, closer towards its ends, since a circle begins as a square root."""
_PIECES = 8
"""Into which a token is cut at least, from top to bottom."""
_ROWS_PER_CHUNK = 256
"""Rows that are looked at together, with the stretches that cross them."""


@dataclass(frozen=True)
class Lines:
    """Polylines in pixels, of one width; a token scores the share of its area that they cover together.

    Attributes:
        points: `(x, y)` of each line; a line of one point is a dot.
        width: of the lines.
        size: width and height of the picture.
    """

    points: tuple[tuple[tuple[float, float], ...], ...]
    width: float
    size: tuple[float, float]

    def on_grid(self, height: int, width: int) -> Tensor:
        """`(height, width)` shares of the tokens of a grid."""
        edges = [torch.arange(count + 1, dtype=torch.float64) / count for count in (height, width)]
        rows, columns = (torch.stack([own[:-1], own[1:]], 1) for own in edges)
        return self._shares(rows, columns).to(torch.float32)

    def on_cells(self, cells: Tensor) -> Tensor:
        """`(tokens,)` shares of cells `(tokens, 4)` in fractions of the sides."""
        rows, row_of = torch.unique(cells[:, 1::2], dim=0, return_inverse=True)
        columns, column_of = torch.unique(cells[:, 0::2], dim=0, return_inverse=True)
        return self._shares(rows, columns)[row_of, column_of].to(torch.float32)

    def misses(self, shown: Tensor) -> bool:
        """Whether one of the lines lies wholly outside a part of the picture."""
        alone = (Lines((line,), self.width, self.size) for line in self.points)
        return not all(line.on_cells(shown[None]).any() for line in alone)

    def _shares(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`(rows, columns)` of cells that are given by starts and ends `(rows, 2)`, `(columns, 2)` in fractions."""
        rows, columns = rows * self.size[1], columns * self.size[0]
        starts, ends = _segments(self.points)
        corners = _corners(starts, ends, self.width / 2)
        heights = _heights(rows, torch.cat([starts, ends]), corners, self.width / 2)
        top, bottom = heights[:-1], heights[1:]
        y = ((top + bottom) / 2)[:, None] + ((bottom - top) / 2)[:, None] * _NODES
        across, column_of = torch.unique(columns, return_inverse=True)
        chunks = y.flatten().split(_ROWS_PER_CHUNK)
        lengths = torch.cat([_covered(own, starts, ends, corners, self.width / 2, across) for own in chunks])
        areas = (lengths.view(*y.shape, -1) * _WEIGHTS[:, None]).sum(1) * ((bottom - top) / 2)[:, None]
        inside = (rows[:, :1] <= top) & (bottom <= rows[:, 1:])
        below = (inside.to(torch.float64) @ areas)[:, column_of]
        cell_areas = (rows[:, 1] - rows[:, 0])[:, None] * (columns[:, 1] - columns[:, 0])
        shares: Tensor = (below[..., 1] - below[..., 0]) / cell_areas
        return shares.clamp(0, 1)


def _segments(lines: tuple[tuple[tuple[float, float], ...], ...]) -> tuple[Tensor, Tensor]:
    """`(segments, 2)` starts and ends of all lines' segments; a dot ends where it starts."""
    pairs = [pair for line in lines for pair in itertools.pairwise(line if len(line) > 1 else line * 2)]
    both = torch.tensor(pairs, dtype=torch.float64)
    return both[:, 0], both[:, 1]


def _corners(starts: Tensor, ends: Tensor, radius: float) -> Tensor:
    """`(segments, 4, 2)` corners of the rectangles along the segments, round ends aside; all in one place for a dot."""
    along = ends - starts
    along = along / torch.linalg.vector_norm(along, dim=1, keepdim=True).clamp(min=1e-12)
    aside = torch.stack([-along[:, 1], along[:, 0]], 1) * radius
    return torch.stack([starts + aside, ends + aside, ends - aside, starts - aside], 1)


def _heights(rows: Tensor, points: Tensor, corners: Tensor, radius: float) -> Tensor:
    """`(heights,)` sorted, at which a cell begins or ends or the outline of a line turns, within the rows."""
    turns = torch.cat([points[:, 1] - radius, points[:, 1], points[:, 1] + radius, corners[..., 1].flatten()])
    parts = torch.arange(_PIECES + 1, dtype=torch.float64) / _PIECES
    pieces = rows[:, :1] + parts * (rows[:, 1:] - rows[:, :1])
    pieces[:, -1] = rows[:, 1]  # to the last bit, since a row's pieces are found by its ends
    heights: Tensor = torch.cat([pieces.flatten(), turns.clamp(rows.min(), rows.max())]).unique()
    return heights


def _covered(y: Tensor, starts: Tensor, ends: Tensor, corners: Tensor, radius: float, across: Tensor) -> Tensor:
    """`(heights, places)` how much of a row at `y` is covered to the left of each place."""
    near = (corners[..., 1].amin(1) - radius < y.max()) & (corners[..., 1].amax(1) + radius > y.min())
    if not near.any():
        return y.new_zeros(len(y), len(across))
    starts, ends, corners = starts[near], ends[near], corners[near]
    lows, highs = [], []
    for centres in (starts, ends):
        reach = (radius**2 - (y[:, None] - centres[:, 1]) ** 2).clamp(min=0).sqrt()
        there = (y[:, None] - centres[:, 1]).abs() < radius
        lows.append(torch.where(there, centres[:, 0] - reach, torch.inf))
        highs.append(torch.where(there, centres[:, 0] + reach, -torch.inf))
    for one, other in zip(corners.unbind(1), corners.roll(-1, 1).unbind(1), strict=True):
        rise = other[:, 1] - one[:, 1]
        part = (y[:, None] - one[:, 1]) / torch.where(rise == 0, torch.inf, rise)
        there = (part >= 0) & (part <= 1) & (rise != 0)
        x = one[:, 0] + part * (other[:, 0] - one[:, 0])
        lows.append(torch.where(there, x, torch.inf))
        highs.append(torch.where(there, x, -torch.inf))
    low, order = torch.stack(lows).amin(0).sort(dim=1)
    high = torch.stack(highs).amax(0).gather(1, order)
    reached = torch.cat([torch.full_like(high[:, :1], -torch.inf), high.cummax(1).values[:, :-1]], 1)
    low = torch.maximum(low, reached)  # what the intervals before it have covered counts once
    low = torch.where(low < high, low, torch.inf)
    lengths: Tensor = (torch.minimum(high[:, None], across[:, None]) - low[:, None]).clamp(min=0).sum(-1)
    return lengths
