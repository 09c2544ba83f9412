"""Cells of the tokens that a tower makes of a square: whole, in parts (LLaVA-OneVision), padded to a square, or pooled.

A tower leaves out what remains beside its last whole patch: SigLIP's 27 patches of 14 pixels cover 378 of 384.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_steer.ground.pictures import Square, fit_canvas, without_padding
from hf_steer.values import Layout


def patch_cells(square: Square) -> Tensor:
    """`(patches, 4)` left, top, right, bottom of the patches of a square, in fractions of its side, row by row."""
    starts = torch.arange(square.patches, dtype=torch.float64) * square.patch_px
    edges = torch.stack([starts, starts + square.patch_px], 1) / square.side_px
    return _grid_cells(edges, edges)


def anyres_layout(height_px: int, width_px: int, square: Square, *, resolutions_px: Any, aspect_ratio: str) -> Layout:
    """A picture alone in its prompt: squashed to one square, then in parts, row by row with a newline each.

    The parts tile the best fitting resolution, in whose middle the picture lies, resized and padded; rows
    and columns of padding are taken out, and what is still too much is interpolated.

    Args:
        height_px: of the original picture.
        width_px: likewise.
        square: that the tower sees at once.
        resolutions_px: heights and widths that the parts may tile.
        aspect_ratio: `"anyres_max_9"` interpolates to about nine times the tokens of one square.
    """
    side, count = square.side_px, square.patches
    best, resized = fit_canvas((height_px, width_px), resolutions_px)
    shape = [length // side * count for length in best]
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    kept = without_padding(torch.stack([rows, columns]), (height_px, width_px))
    sizes = list(kept.shape[1:])
    most = int(aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(sizes[0] * sizes[1] / (most * count**2))
    tokens = [int(size // ratio) for size in sizes] if ratio > 1.1 else sizes
    edges = []
    for axis in (0, 1):
        first = int(kept[axis, 0, 0]) if kept.numel() else 0  # nothing is left of a picture like a thread
        on_canvas = _part_edges(first, sizes[axis], tokens[axis], square)
        edges.append((on_canvas - (best[axis] - resized[axis]) // 2) / resized[axis])
    parts = _grid_cells(*edges).view(*tokens, 4)
    newlines = torch.full((tokens[0], 1, 4), torch.nan, dtype=torch.float64)
    cells = torch.cat([patch_cells(square), torch.cat([parts, newlines], 1).view(-1, 4)])
    return Layout(cells=_inside(cells), size=(width_px, height_px))


def padded_layout(height_px: int, width_px: int, square: Square) -> Layout:
    """One of several pictures of a prompt: padded to a square around its middle, resized, with a newline at the end."""
    cells = patch_cells(square) * max(height_px, width_px)
    sides = torch.tensor([width_px, height_px], dtype=torch.float64)
    before = (max(height_px, width_px) - sides).div(2, rounding_mode="floor")
    cells = (cells - before.repeat(2)) / sides.repeat(2)
    return Layout(cells=_inside(_with_newline(cells)), size=(width_px, height_px))


def pooled_layout(frames: int, square: Square) -> Layout:
    """A video: each frame squashed to a square, its patches interpolated to half as many a side; a newline at the end."""
    pooled = square.pooled
    edges = torch.arange(pooled + 1, dtype=torch.float64) * (square.patches / pooled) * square.patch_px / square.side_px
    edges = torch.stack([edges[:-1], edges[1:]], 1)
    return Layout(grid=(frames, pooled, pooled), cells=_with_newline(_grid_cells(edges, edges).repeat(frames, 1)))


def _part_edges(first: int, kept: int, tokens: int, square: Square) -> Tensor:
    """`(tokens, 2)` start and end in pixels of the canvas, when `kept` rows of patches from `first` on give so many tokens."""
    patch = square.patch_px
    edges = []
    for token in range(tokens):
        start, end = first + token * kept / tokens, first + (token + 1) * kept / tokens
        last = math.ceil(end) - 1  # patches of one part touch, but there may be a gap before the next part
        edges.append([_pixel(int(start), square) + (start - int(start)) * patch,
                      _pixel(last, square) + (end - last) * patch])  # fmt: skip
    return torch.tensor(edges, dtype=torch.float64).view(-1, 2)


def _pixel(index: int, square: Square) -> int:
    """Where a patch begins on the canvas."""
    return index // square.patches * square.side_px + index % square.patches * square.patch_px


def _grid_cells(rows: Tensor, columns: Tensor) -> Tensor:
    """`(rows * columns, 4)` cells out of `(rows, 2)` tops and bottoms and `(columns, 2)` lefts and rights."""
    vertical = rows[:, None].expand(-1, len(columns), -1)
    across = columns[None].expand(len(rows), -1, -1)
    return torch.stack([across[..., 0], vertical[..., 0], across[..., 1], vertical[..., 1]], -1).reshape(-1, 4)


def _with_newline(cells: Tensor) -> Tensor:
    return torch.cat([cells, torch.full((1, 4), torch.nan, dtype=torch.float64)])


def _inside(cells: Tensor) -> Tensor:
    """The part of each cell that shows the picture; NaN where that is nothing but padding."""
    clipped = cells.clamp(0, 1)
    empty = (clipped[:, 2] <= clipped[:, 0]) | (clipped[:, 3] <= clipped[:, 1])
    return torch.where(empty[:, None], torch.nan, clipped)
