"""What every contender steers towards: a third of the tokens, as if an image stood there."""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 2.0
"""λ of every head of every layer."""


def image_span(tokens: int) -> tuple[int, int]:
    """First and one past the last token of the image: the second of three thirds."""
    return tokens // 3, max(tokens // 3 + 1, 2 * tokens // 3)


def image_scores(batch: int, tokens: int, *, device: str, flat: bool = False, seed: int = 0) -> Tensor:
    """`(batch, tokens)` float32: in (0, 1] on the image, 0 elsewhere.

    Args:
        batch: rows.
        tokens: keys.
        device: of the scores.
        flat: 1 all over the image, for rivals that know only inside and outside.
        seed: of the draw.
    """
    first, end = image_span(tokens)
    scores = torch.zeros(batch, tokens)
    drawn = 1 - torch.rand(batch, end - first, generator=torch.Generator().manual_seed(seed))
    scores[:, first:end] = 1.0 if flat else drawn
    return scores.to(device)


def causal(queries: int, keys: int, device: str) -> Tensor:
    """`(queries, keys)` bool: the last query sees all keys."""
    places = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) <= places[:, None]


def dense_bias(bias: Tensor, heads: int, queries: int, dtype: torch.dtype) -> Tensor:
    """`(batch, heads, queries, keys)`: a bias per key, `(batch, keys)`, the lowest number where a query must not look.

    The same for all heads here, but stored for each, as heads with strengths of their own need it.
    """
    keys, lowest = bias.shape[1], torch.finfo(dtype).min
    rows = torch.where(causal(queries, keys, str(bias.device)), bias[:, None].to(dtype), lowest)
    return rows[:, None].expand(-1, heads, -1, -1).contiguous()
