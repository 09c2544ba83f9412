"""How a LLaVA cuts a picture or video up for its tower, and lays what that saw out as prompt tokens: all that is known of it.

A tower sees squares: the picture whole, in parts (LLaVA-OneVision), padded to a square, or a video's frames, pooled. It leaves out
what remains beside its last whole patch: SigLIP's 27 patches of 14 pixels cover 378 of 384.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.ground.pictures import Square, fit_canvas, without_padding
from hf_steer.values import Layout

Sides = tuple[int, int]
"""Height and width."""


class Cut(Protocol):
    """One picture, or one video."""

    @property
    def takes(self) -> int:
        """Squares that the tower sees of it: base and parts, or frames."""

    def layout(self) -> Layout:
        """Where each of its prompt tokens lies."""

    def lay(self, seen: Tensor) -> Tensor:
        """`(prompt tokens, channels)` out of `(squares, tower's tokens, channels)`, with zeros for newlines."""


@dataclass(frozen=True)
class Whole:
    """A picture that is one square.

    Attributes:
        square: that the tower sees.
        ahead: tokens that the model keeps before the patches; -1 where it drops the first patch.
        cropped: whether the processor cuts the square out of the middle of the picture (CLIP), or squashes it.
    """

    square: Square
    ahead: int
    cropped: bool
    takes: int = 1

    def layout(self) -> Layout:
        """A grid, where every patch is kept."""
        grid = (1, self.square.patches, self.square.patches) if self.ahead >= 0 else None
        return Layout(grid=grid, cells=self._cells(), fit=self.uncropped if self.cropped else None)

    def uncropped(self, size: tuple[float, float]) -> Tensor:
        """Cells in fractions of a whole picture of this width and height."""
        return uncrop(self._cells(), self.square.side_px, size)

    def _cells(self) -> Tensor:
        nowhere = torch.full((max(self.ahead, 0), 4), torch.nan, dtype=torch.float64)
        return torch.cat([nowhere, patch_cells(self.square)[max(-self.ahead, 0) :]])

    def lay(self, seen: Tensor) -> Tensor:
        """As they are."""
        return seen[0]


@dataclass(frozen=True)
class Padded:
    """One of several pictures of a prompt: padded to a square around its middle, resized, with a newline at the end.

    Attributes:
        size: of the original picture, in pixels.
        square: that the tower sees.
    """

    size: Sides
    square: Square
    takes: int = 1

    def layout(self) -> Layout:
        """Cells that show nothing but padding are nowhere."""
        height, width = self.size
        cells = patch_cells(self.square) * max(self.size)
        sides = torch.tensor([width, height], dtype=torch.float64)
        before = (max(self.size) - sides).div(2, rounding_mode="floor")
        cells = (cells - before.repeat(2)) / sides.repeat(2)
        return Layout(cells=inside(_with_newline(cells)), size=(width, height))

    def lay(self, seen: Tensor) -> Tensor:
        """Row by row, then the newline."""
        return F.pad(seen[0], (0, 0, 0, 1))


@dataclass(frozen=True)
class Parts:
    """A picture alone in its prompt: squashed to one square, then in parts, row by row with a newline each.

    The parts tile the best fitting resolution, in whose middle the picture lies, resized and padded; rows and columns of padding
    are taken out, and what is still too much is interpolated.

    Attributes:
        size: of the original picture, in pixels.
        square: that the tower sees at once.
        canvas: which the parts tile, in pixels.
        resized: size that the picture has on it.
        first: row and column of the first patch that is kept.
        kept: rows and columns of patches that are kept.
        tokens: into how many they are interpolated.
    """

    size: Sides
    square: Square
    canvas: Sides
    resized: Sides
    first: Sides
    kept: Sides
    tokens: Sides

    @property
    def tiles(self) -> Sides:
        """Rows and columns of parts."""
        return self.canvas[0] // self.square.side_px, self.canvas[1] // self.square.side_px

    @property
    def takes(self) -> int:
        return 1 + math.prod(self.tiles)

    def layout(self) -> Layout:
        """The base, then the parts; each token shows the patches, or shares of them, that it is made of."""
        edges = [(self._edges(axis) - (self.canvas[axis] - self.resized[axis]) // 2) / self.resized[axis] for axis in (0, 1)]
        parts = grid_cells(*edges).view(*self.tokens, 4)
        newlines = torch.full((self.tokens[0], 1, 4), torch.nan, dtype=torch.float64)
        cells = torch.cat([patch_cells(self.square), torch.cat([parts, newlines], 1).view(-1, 4)])
        return Layout(cells=inside(cells), size=self.size[::-1])

    def lay(self, seen: Tensor) -> Tensor:
        """The base, then the parts side by side, without padding, interpolated where they are too many."""
        count = self.square.patches
        parts = seen[1:].view(*self.tiles, count, count, -1).permute(4, 0, 2, 1, 3)
        canvas = parts.reshape(-1, self.tiles[0] * count, self.tiles[1] * count)
        (row, column), (rows, columns) = self.first, self.kept
        picture = canvas[:, row : row + rows, column : column + columns]
        if self.tokens != self.kept:
            picture = F.interpolate(picture[None], list(self.tokens), mode="bilinear")[0]
        return torch.cat([seen[0], F.pad(picture, (0, 1)).flatten(1).mT])

    def _edges(self, axis: int) -> Tensor:
        """`(tokens, 2)` where the tokens along an axis start and end, in pixels of the canvas."""
        first, kept, tokens, patch = self.first[axis], self.kept[axis], self.tokens[axis], self.square.patch_px
        edges = []
        for token in range(tokens):
            start, end = first + token * kept / tokens, first + (token + 1) * kept / tokens
            last = math.ceil(end) - 1  # patches of one part touch, but there may be a gap before the next part
            edges.append([self._pixel(int(start)) + (start - int(start)) * patch, self._pixel(last) + (end - last) * patch])
        return torch.tensor(edges, dtype=torch.float64).view(-1, 2)

    def _pixel(self, index: int) -> int:
        """Where a patch begins on the canvas."""
        part, place = divmod(index, self.square.patches)
        return part * self.square.side_px + place * self.square.patch_px


def cut_in_parts(size: Sides, square: Square, *, resolutions_px: Any, aspect_ratio: str | None = None) -> Parts:
    """The parts of a picture.

    Args:
        size: of the original picture, in pixels.
        square: that the tower sees at once.
        resolutions_px: heights and widths that the parts may tile.
        aspect_ratio: `"anyres_max_9"` interpolates to about nine times the tokens of one square; None keeps all (LLaVA-NeXT).
    """
    canvas, resized = fit_canvas(size, resolutions_px)
    shape = [length // square.side_px * square.patches for length in canvas]
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    left = without_padding(torch.stack([rows, columns]), size)
    kept = int(left.shape[1]), int(left.shape[2])
    most = math.inf if aspect_ratio is None else int(aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(kept[0] * kept[1] / (most * square.patches**2))
    tokens = (int(kept[0] // ratio), int(kept[1] // ratio)) if ratio > 1.1 else kept
    first = (int(left[0, 0, 0]), int(left[1, 0, 0])) if left.numel() else (0, 0)  # nothing is left of a picture like a thread
    return Parts(size, square, canvas, resized, first, kept, tokens)


@dataclass(frozen=True)
class Pooled:
    """A video: each frame squashed to a square, its patches interpolated to half as many a side; a newline at the end.

    Attributes:
        takes: its frames.
        square: that the tower sees of each.
    """

    takes: int
    square: Square

    def layout(self) -> Layout:
        """A grid of frames, and the newline."""
        side, patch = self.square.pooled, self.square.patches / self.square.pooled * self.square.patch_px
        edges = torch.arange(side + 1, dtype=torch.float64) * (patch / self.square.side_px)
        edges = torch.stack([edges[:-1], edges[1:]], 1)
        return Layout(grid=(self.takes, side, side), cells=_with_newline(grid_cells(edges, edges).repeat(self.takes, 1)))

    def lay(self, seen: Tensor) -> Tensor:
        """Frame by frame, row by row, then the newline."""
        frames = seen.unflatten(1, (self.square.patches, self.square.patches)).permute(0, 3, 1, 2)
        pooled = F.interpolate(frames, [self.square.pooled] * 2, mode="bilinear")
        return F.pad(pooled.flatten(2).mT.flatten(0, 1), (0, 0, 0, 1))


def uncrop(cells: Tensor, side_px: int, size: tuple[float, float]) -> Tensor:
    """Cells in fractions of a whole picture, out of those of its centre square.

    Args:
        cells: `(tokens, 4)` in fractions of the square.
        side_px: of the square, to which the picture's shorter side is resized.
        size: width and height of the picture, in pixels or to another scale.
    """
    # the longer side follows, rounded down, and is cut to as much in the middle
    sides = [side_px if side == min(size) else int(side_px * side / min(size)) for side in size]
    before = torch.tensor([(side - side_px) // 2 for side in sides] * 2, dtype=torch.float64)
    return (cells * side_px + before) / torch.tensor(sides * 2, dtype=torch.float64)


def patch_cells(square: Square) -> Tensor:
    """`(patches, 4)` left, top, right, bottom of the patches of a square, in fractions of its side, row by row."""
    starts = torch.arange(square.patches, dtype=torch.float64) * square.patch_px
    edges = torch.stack([starts, starts + square.patch_px], 1) / square.side_px
    return grid_cells(edges, edges)


def grid_cells(rows: Tensor, columns: Tensor) -> Tensor:
    """`(rows * columns, 4)` cells out of `(rows, 2)` tops and bottoms and `(columns, 2)` lefts and rights."""
    vertical = rows[:, None].expand(-1, len(columns), -1)
    across = columns[None].expand(len(rows), -1, -1)
    return torch.stack([across[..., 0], vertical[..., 0], across[..., 1], vertical[..., 1]], -1).reshape(-1, 4)


def _with_newline(cells: Tensor) -> Tensor:
    return torch.cat([cells, torch.full((1, 4), torch.nan, dtype=torch.float64)])


def inside(cells: Tensor) -> Tensor:
    """The part of each cell that shows the picture; NaN where that is nothing but padding."""
    clipped = cells.clamp(0, 1)
    empty = (clipped[:, 2] <= clipped[:, 0]) | (clipped[:, 3] <= clipped[:, 1])
    return torch.where(empty[:, None], torch.nan, clipped)
