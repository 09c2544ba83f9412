"""A picture in tiles of one size, row by row, with the whole of it in one more, or amid padding: where its tokens lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.errors import SaliencyError
from hf_steer.ground.pictures import Square
from hf_steer.ground.tilings import Canvas, least_scaled, padded_up
from hf_steer.saliency.cuts import inside, patch_cells
from hf_steer.values import Layout

Tiling = Callable[[tuple[int, int], int, int], "Canvas | None"]
"""From height and width of a picture, the side of a tile in pixels and the number of tiles to the canvas that they cover; None for
a picture that is not cut into so many."""
_UNIT = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
"""A tile that is one token."""


@dataclass(frozen=True)
class Tiled:
    """One picture. How its tiles are arranged depends on its shape, which the model's inputs do not tell.

    Attributes:
        square: a tile, in prompt tokens.
        tiles: how many there are, the whole not counted; 0 where it came alone.
        tiling: how the processor arranges them.
    """

    square: Square
    tiles: int
    tiling: Tiling

    def layout(self) -> Layout:
        """The whole alone is a grid; tiles are arranged when the shape is known, and in about a square until then."""
        if not self.tiles:
            side = self.square.patches
            return Layout(grid=(1, side, side), cells=patch_cells(self.square))
        rows = max(rows for rows in range(1, math.isqrt(self.tiles) + 1) if self.tiles % rows == 0)
        return Layout(cells=self._cells(Canvas(rows, self.tiles // rows)), fit=self.of_picture)

    def of_picture(self, size: tuple[float, float]) -> Tensor:
        """`(tokens, 4)` cells of a picture of this width and height."""
        width, height = size
        canvas = self.tiling((round(height), round(width)), self.square.side_px, self.tiles)
        if canvas is None:
            raise _of_another_shape(size, f"{self.tiles} tiles of it")
        return self._cells(canvas)

    def _cells(self, canvas: Canvas) -> Tensor:
        """Of the tiles, and of the whole after them."""
        whole = patch_cells(self.square)
        return torch.cat([cells_on(canvas, whole), whole])


def cells_on(canvas: Canvas, tile: Tensor) -> Tensor:
    """`(tokens, 4)` cells of all tiles in fractions of the picture, out of those of one in fractions of itself; NaN for padding."""
    rows, columns = torch.meshgrid(torch.arange(canvas.rows), torch.arange(canvas.columns), indexing="ij")
    corners = torch.stack([columns, rows, columns, rows], -1).view(-1, 1, 4)
    shares = torch.tensor([canvas.columns * canvas.width, canvas.rows * canvas.height] * 2, dtype=torch.float64)
    return inside(((tile + corners) / shares).view(-1, 4))


@dataclass(frozen=True)
class Headed:
    """One picture in as many tiles as there may be, each behind a token of its class, in the top left corner (Mllama).

    Attributes:
        square: a tile, in what the encoder hands on.
        tiled: rows and columns of tiles that show the picture; None where there is no picture.
        most: tiles that are handed on, those of padding last.
    """

    square: Square
    tiled: tuple[int, int] | None
    most: int

    def layout(self) -> Layout:
        """How much of the tiles is padding is known with the picture's size."""
        fit = None if self.tiled is None else self.of_picture
        return Layout(cells=self._cells(None if self.tiled is None else Canvas(*self.tiled)), fit=fit)

    def of_picture(self, size: tuple[float, float]) -> Tensor:
        """`(positions, 4)` cells of a picture of this width and height; NaN for one that shows none of it."""
        width, height = size
        canvas = least_scaled((round(height), round(width)), self.square.side_px, self.most)
        if (canvas.rows, canvas.columns) != self.tiled:
            raise _of_another_shape(size, "{} x {} tiles of it".format(*(self.tiled or ())))
        return self._cells(canvas)

    def _cells(self, canvas: Canvas | None) -> Tensor:
        tile = F.pad(patch_cells(self.square), (0, 0, 1, 0), value=torch.nan)
        shown = tile[:0] if canvas is None else cells_on(canvas, tile)
        return F.pad(shown, (0, 0, 0, self.most * len(tile) - len(shown)), value=torch.nan)


@dataclass(frozen=True)
class Centred:
    """One picture, whose longer side is as long as the square, in the middle of padding (DeepSeek-VL, Janus).

    Attributes:
        square: that the tower sees, in prompt tokens.
        least_px: to which the processor stretches a shorter side.
    """

    square: Square
    least_px: int = 14

    def layout(self) -> Layout:
        """How much of the square is padding is known with the picture's shape."""
        return Layout(cells=patch_cells(self.square), fit=self.of_picture)

    def of_picture(self, size: tuple[float, float]) -> Tensor:
        """`(tokens, 4)` cells of a picture of this width and height; NaN for a token that shows nothing but padding."""
        side = self.square.side_px
        resized = torch.tensor([max(round(length * side / max(size)), self.least_px) for length in size] * 2, dtype=torch.float64)
        before = (side - resized).div(2, rounding_mode="floor")
        return inside((patch_cells(self.square) * side - before) / resized)


@dataclass(frozen=True)
class Cornered:
    """One picture on a grid of its own, in the top left corner of padding (Kimi-K2.5).

    Attributes:
        tokens: rows and columns.
        token_px: side of a token.
        patch_px: side of a patch.
    """

    tokens: tuple[int, int]
    token_px: int
    patch_px: int

    def layout(self) -> Layout:
        """How much of the last row and column is padding is known with the picture's shape."""
        return Layout(grid=(1, *self.tokens), cells=cells_on(Canvas(*self.tokens), _UNIT), fit=self.of_picture)

    def of_picture(self, size: tuple[float, float]) -> Tensor:
        """`(tokens, 4)` cells of a picture of this width and height."""
        width, height = size
        canvas = padded_up((round(height), round(width)), self.tokens, self.token_px, self.patch_px)
        if canvas is None:
            raise _of_another_shape(size, f"{self.tokens[1]} x {self.tokens[0]} tokens for it")
        return cells_on(canvas, _UNIT)


def _of_another_shape(size: tuple[float, float], made: str) -> SaliencyError:
    return SaliencyError(
        f"a picture was said to have {size[0]:g} x {size[1]:g} pixels; the model's inputs hold {made}, and one of this shape does "
        "not make so many. Give image_size=(width, height) of the original picture, also for a mask or map of another size, and "
        "check row= and image=. If the processor was told to cut pictures otherwise, give one score per token with "
        "Saliency.from_tokens(...)."
    )
