"""Cells of the tokens that a tower makes of a square: whole, in parts (LLaVA-OneVision), padded to a square, or pooled.

A tower leaves out what remains beside its last whole patch: SigLIP's 27 patches of 14 pixels cover 378 of 384.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_steer.values import Layout


def patch_cells(side_px: int, patch_px: int) -> Tensor:
    """`(patches, 4)` left, top, right, bottom of the patches of a square, in fractions of its side, row by row."""
    starts = torch.arange(side_px // patch_px, dtype=torch.float64) * patch_px
    edges = torch.stack([starts, starts + patch_px], 1) / side_px
    return _grid_cells(edges, edges)


def anyres_layout(height_px: int, width_px: int, config: Any, vision_aspect_ratio: str) -> Layout:
    """A picture alone in its prompt: squashed to one square, then in parts, row by row with a newline each.

    The parts tile the best fitting resolution of the configuration, in whose middle the picture lies, resized and padded; rows
    and columns of padding are taken out, and what is still too much is interpolated.

    Args:
        height_px: of the original picture.
        width_px: likewise.
        config: of the model.
        vision_aspect_ratio: `"anyres_max_9"` interpolates to about nine times the tokens of one square.
    """
    # the model's own arithmetic; imported here, since it loads the model's file, which is loaded whenever this runs
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.image_utils import ChannelDimension
    from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    count = side // patch
    best = select_best_resolution((height_px, width_px), config.image_grid_pinpoints)
    shape = [length // side * count for length in best]
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    kept = unpad_image(torch.stack([rows, columns]), [height_px, width_px])
    sizes = list(kept.shape[1:])
    most = int(vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(sizes[0] * sizes[1] / (most * count**2))
    tokens = [int(size // ratio) for size in sizes] if ratio > 1.1 else sizes
    resized = get_patch_output_size(torch.empty(3, height_px, width_px, device="meta"), best, ChannelDimension.FIRST)
    edges = []
    for axis in (0, 1):
        first = int(kept[axis, 0, 0]) if kept.numel() else 0  # nothing is left of a picture like a thread
        on_canvas = _part_edges(first, sizes[axis], tokens[axis], side, patch)
        edges.append((on_canvas - (best[axis] - resized[axis]) // 2) / resized[axis])
    parts = _grid_cells(*edges).view(*tokens, 4)
    newlines = torch.full((tokens[0], 1, 4), torch.nan, dtype=torch.float64)
    cells = torch.cat([patch_cells(side, patch), torch.cat([parts, newlines], 1).view(-1, 4)])
    return Layout(cells=_inside(cells), size=(width_px, height_px))


def padded_layout(height_px: int, width_px: int, config: Any) -> Layout:
    """One of several pictures of a prompt: padded to a square around its middle, resized, with a newline at the end."""
    cells = patch_cells(config.vision_config.image_size, config.vision_config.patch_size) * max(height_px, width_px)
    sides = torch.tensor([width_px, height_px], dtype=torch.float64)
    before = (max(height_px, width_px) - sides).div(2, rounding_mode="floor")
    cells = (cells - before.repeat(2)) / sides.repeat(2)
    return Layout(cells=_inside(_with_newline(cells)), size=(width_px, height_px))


def pooled_side(config: Any) -> int:
    """Tokens a side of a video's frame: half as many as patches, rounded up."""
    return math.ceil(int(config.vision_config.image_size) // int(config.vision_config.patch_size) / 2)


def pooled_layout(frames: int, config: Any) -> Layout:
    """A video: each frame squashed to a square, its patches interpolated to half as many a side; a newline at the end."""
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    pooled = pooled_side(config)
    edges = torch.arange(pooled + 1, dtype=torch.float64) * (side // patch / pooled) * patch / side
    edges = torch.stack([edges[:-1], edges[1:]], 1)
    return Layout(grid=(frames, pooled, pooled), cells=_with_newline(_grid_cells(edges, edges).repeat(frames, 1)))


def _part_edges(first: int, kept: int, tokens: int, side: int, patch: int) -> Tensor:
    """`(tokens, 2)` start and end in pixels of the canvas, when `kept` rows of patches from `first` on give so many tokens."""
    count = side // patch
    edges = []
    for token in range(tokens):
        start, end = first + token * kept / tokens, first + (token + 1) * kept / tokens
        last = math.ceil(end) - 1  # patches of one part touch, but there may be a gap before the next part
        edges.append([_pixel(int(start), count, side, patch) + (start - int(start)) * patch,
                      _pixel(last, count, side, patch) + (end - last) * patch])  # fmt: skip
    return torch.tensor(edges, dtype=torch.float64).view(-1, 2)


def _pixel(index: int, count: int, side: int, patch: int) -> int:
    """Where a patch begins on the canvas."""
    return index // count * side + index % count * patch


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
