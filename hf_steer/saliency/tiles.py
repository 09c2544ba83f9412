"""A picture in tiles of one size, row by row, with the whole of it in one more, or amid padding: where its tokens lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.ground.pictures import Square
from hf_steer.ground.tilings import Canvas
from hf_steer.saliency.cuts import inside, patch_cells
from hf_steer.values import Layout

Tiling = Callable[[tuple[int, int], int, int], "Canvas | None"]
"""From height and width of a picture, the side of a tile in pixels and the number of tiles to the canvas that they cover; None for
a picture that is not cut into so many."""


@dataclass(frozen=True)
class Tiled:
    """One picture. How its tiles are arranged depends on its shape, which the model's inputs do not tell.

    Attributes:
        square: a tile, in prompt tokens.
        tiles: how many there are, the whole not counted; 0 where it came alone.
        tiling: how the processor arranges them.
        whole_first: whether the whole comes before its tiles, or after them.
    """

    square: Square
    tiles: int
    tiling: Tiling
    whole_first: bool = False

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
            raise SaliencyError(
                f"a picture was said to have {width:g} x {height:g} pixels; the model's inputs hold {self.tiles} tiles of it, and "
                "one of this shape is not cut into so many. Give image_size=(width, height) of the original picture, also for a "
                "mask or map of another size, and check row= and image=. If the processor was told to cut pictures otherwise, "
                "give one score per token with Saliency.from_tokens(...)."
            )
        return self._cells(canvas)

    def _cells(self, canvas: Canvas) -> Tensor:
        """Tiles in fractions of the picture, padding nowhere, and the whole before or after them."""
        whole = patch_cells(self.square)
        rows, columns = torch.meshgrid(torch.arange(canvas.rows), torch.arange(canvas.columns), indexing="ij")
        corners = torch.stack([columns, rows, columns, rows], -1).view(-1, 1, 4)
        shares = torch.tensor([canvas.columns * canvas.width, canvas.rows * canvas.height] * 2, dtype=torch.float64)
        tiles = inside(((whole + corners) / shares).view(-1, 4))
        return torch.cat([whole, tiles] if self.whole_first else [tiles, whole])


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
