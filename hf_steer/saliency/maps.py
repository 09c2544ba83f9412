"""Back from tokens to the picture: their scores as a map over the whole of it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_steer.values import Layout

_FINEST = 96
"""Cells per side of a map that tokens of several sizes are laid onto, at most."""


def map_of(values: Tensor, layout: Layout, size: tuple[float, float] | None = None) -> Tensor:
    """Scores of a picture's, video's or sound's tokens over its whole extent.

    Args:
        values: `(tokens,)`.
        layout: where they lie.
        size: `(width, height)` of the original picture, where the model's inputs do not tell its shape; a square when None.

    Returns:
        `(frames, height, width)` float32: one cell per token where they form a regular grid; otherwise the mean of the tokens
        that see a place, 0 where none does. A sound is one row.
    """
    if layout.cells is None:
        return values.float().view(layout.grid or (1, 1, -1))
    if layout.cells.shape[1] == 2:
        return values.float()[None, None]
    known = size or layout.size
    cells = layout.at(None if known is None else (known[0], known[1])).cells
    assert cells is not None
    per_frame = len(values) // layout.frames
    frames = [slice(frame * per_frame, (frame + 1) * per_frame) for frame in range(layout.frames)]
    if layout.frames == 1:
        frames = [slice(None)]
    return torch.stack([_rasterise(values[own].float(), cells[own]) for own in frames])


def _rasterise(values: Tensor, cells: Tensor) -> Tensor:
    """`(height, width)` mean over the tokens whose cell holds the middle of a place."""
    placed = ~torch.isnan(cells).any(1)
    values, cells = values[placed], cells[placed]
    smallest = (cells[:, 2:] - cells[:, :2]).amin(0).clamp(min=1 / _FINEST)
    width, height = (max(1, round(1 / float(side))) for side in smallest)
    total, count = torch.zeros(height, width), torch.zeros(height, width)
    edges = cells * torch.tensor([width, height, width, height], dtype=cells.dtype)
    first, last = (edges[:, :2] - 0.5).ceil().long(), (edges[:, 2:] - 0.5).ceil().long()  # middles from first on, before last
    for value, (left, top), (right, bottom) in zip(values, first.tolist(), last.tolist(), strict=True):
        total[top : max(bottom, top + 1), left : max(right, left + 1)] += value
        count[top : max(bottom, top + 1), left : max(right, left + 1)] += 1
    return total / count.clamp(min=1)
