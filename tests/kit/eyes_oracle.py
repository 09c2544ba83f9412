"""A vision tower's attention and a LLaVA's layout of its pictures, in plain loops and fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, scaling: float) -> list[list[float]]:
    """Mean over heads of the attention weights of one segment: `[query][key]`, from `(heads, patches, head_dim)`."""
    heads, patches, _ = query.shape
    mean = [[0.0] * patches for _ in range(patches)]
    for head in range(heads):
        for q in range(patches):
            logits = [scaling * float(query[head, q].double() @ key[head, k].double()) for k in range(patches)]
            top = max(logits)
            total = sum(math.exp(logit - top) for logit in logits)
            for k in range(patches):
                mean[q][k] += math.exp(logits[k] - top) / total / heads
    return mean


def block_diagonal(segments: list[list[list[float]]]) -> Tensor:
    """One matrix of all segments of a block, `(patches, patches)` fp64."""
    return torch.block_diag(*(torch.tensor(segment, dtype=torch.float64) for segment in segments))


def received(blocks: list[Tensor]) -> Tensor:
    """What each patch receives from all queries, averaged over the blocks."""
    patches = len(blocks[0])
    return torch.tensor(
        [sum(float(block[q, k]) for block in blocks for q in range(patches)) / len(blocks) for k in range(patches)],
        dtype=torch.float64,
    )


def rollout(blocks: list[Tensor]) -> Tensor:
    """Abnar and Zuidema's product of `0.5 A + 0.5 I` over all patches, first block on the right, summed over the rows."""
    patches = len(blocks[0])
    product = [[float(row == column) for column in range(patches)] for row in range(patches)]
    for block in blocks:
        step = [[0.5 * float(block[q, k]) + 0.5 * (q == k) for k in range(patches)] for q in range(patches)]
        product = [
            [sum(step[q][inner] * product[inner][k] for inner in range(patches)) for k in range(patches)] for q in range(patches)
        ]
    return torch.tensor([sum(product[q][k] for q in range(patches)) for k in range(patches)], dtype=torch.float64)


def windows(frames: int, height: int, width: int, side: int) -> list[int]:
    """Tokens of a grid in the order in which Qwen2.5-VL's tower takes them: window by window, `side` tokens per side."""
    order = []
    for frame in range(frames):
        for top in range(0, height, side):
            for left in range(0, width, side):
                order += [
                    (frame * height + y) * width + x
                    for y in range(top, min(top + side, height))
                    for x in range(left, min(left + side, width))
                ]
    return order


def anyres(pictures: list[list[float]], side: int, tiles: tuple[int, int], size: tuple[int, int], most: int) -> list[float | None]:
    """Tokens of one picture of LLaVA-OneVision, None for newlines: base, then the crops side by side, the padding cut away,
    and shrunk where more than `most` crops' worth are left.

    Args:
        pictures: base and crops, each `side * side` scores.
        side: patches per side of a picture that the tower sees.
        tiles: rows and columns of crops; (0, 0) for a base alone.
        size: height and width of the original.
        most: of `anyres_max_<most>`.
    """
    if tiles == (0, 0):  # in a square that is padded to the middle; what sees padding alone says nothing
        return [*(value if _sees(place, side, size) else None for place, value in enumerate(pictures[0])), None]
    whole = [
        [pictures[1 + (y // side) * tiles[1] + x // side][(y % side) * side + x % side] for x in range(tiles[1] * side)]
        for y in range(tiles[0] * side)
    ]
    height, width = len(whole), len(whole[0])
    if size[1] / size[0] > width / height:
        gap = (height - int(round(size[0] * width / size[1], 7))) // 2
        whole = whole[gap : height - gap]
    else:
        gap = (width - int(round(size[1] * height / size[0], 7))) // 2
        whole = [row[gap : width - gap] for row in whole]
    ratio = math.sqrt(len(whole) * len(whole[0]) / (most * side**2))
    if ratio > 1.1:
        whole = shrink(whole, int(len(whole) // ratio), int(len(whole[0]) // ratio))
    return [*pictures[0], *(token for row in whole for token in [*row, None])]


def _sees(place: int, side: int, size: tuple[int, int]) -> bool:
    """Whether a patch of the square around a picture `(height, width)` shows a part of it."""
    longer = max(size)
    for number, length in zip(divmod(place, side), size, strict=True):
        before = (longer - length) // 2
        if (number + 1) * longer / side <= before or number * longer / side >= before + length:
            return False
    return True


def pooled(frames: list[list[float]], side: int) -> list[float | None]:
    """Tokens of one video of LLaVA-OneVision: each frame at half the resolution, and one newline."""
    half = math.ceil(side / 2)
    tokens: list[float | None] = []
    for frame in frames:
        rows = shrink([frame[y * side : (y + 1) * side] for y in range(side)], half, half)
        tokens += [value for row in rows for value in row]
    return [*tokens, None]


def shrink(rows: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Bilinear interpolation between pixel centres, without antialiasing."""

    def places(count: int, old: int) -> list[tuple[int, int, float]]:
        sources = [max(0.0, (index + 0.5) * old / count - 0.5) for index in range(count)]
        return [(int(source), min(int(source) + 1, old - 1), source - int(source)) for source in sources]

    return [
        [
            (1 - dy) * ((1 - dx) * rows[y0][x0] + dx * rows[y0][x1]) + dy * ((1 - dx) * rows[y1][x0] + dx * rows[y1][x1])
            for x0, x1, dx in places(width, len(rows[0]))
        ]
        for y0, y1, dy in places(height, len(rows))
    ]
