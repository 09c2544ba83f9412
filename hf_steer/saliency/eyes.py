"""The model's own eyes: the attention that each patch receives in chosen blocks of the vision tower.

Nothing is run twice: the scores come from the queries and keys that the tower computes anyway, in chunks of queries, so
that memory grows with the number of patches and not with its square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

_SCORES_PER_CHUNK = 1 << 22
"""Attention weights held at once: 16 MB in float32."""


@torch.no_grad()
def attention_received(query: Tensor, key: Tensor, scaling: float, *, scores_per_chunk: int = _SCORES_PER_CHUNK) -> Tensor:
    """Mean over heads of the attention that each key receives from all queries.

    Args:
        query: `(heads, patches, head_dim)`, rotary embedding applied.
        key: `(heads, patches, head_dim)`.
        scaling: factor on the logits.
        scores_per_chunk: bound on the attention weights held at once.

    Returns:
        `(patches,)` float32, at least 0, with mean 1: a patch with 2 receives twice its even share.
    """
    heads, patches, _ = query.shape
    rows = max(1, scores_per_chunk // (heads * patches))
    keys = key.float().transpose(1, 2)
    received = torch.zeros(patches, dtype=torch.float32, device=query.device)
    for chunk in query.float().split(rows, dim=1):
        received += torch.softmax(chunk @ keys * scaling, dim=-1).sum(dim=(0, 1))
    return received / heads


@dataclass(frozen=True)
class EyeRecord:
    """What the tower attended to in one call.

    Attributes:
        scores: `(tokens,)` float32 over all pictures of the call, in prompt order.
        grids: frames, height, width of each picture, in tokens.
    """

    scores: Tensor
    grids: tuple[tuple[int, int, int], ...]


class EyeRecorder:
    """Rides through one call of the vision tower and collects the scores of its segments (pictures, frames, windows);
    the record also goes to `sink`, where one is given."""

    def __init__(self, sink: list[EyeRecord] | None = None) -> None:
        self._sink = sink
        self._segments: dict[nn.Module, list[Tensor]] = {}
        self._closed = False

    def add(self, block: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        """Take `(1, heads, patches, head_dim)` of one segment; a recomputation under gradient checkpointing is ignored."""
        if not self._closed:
            self._segments.setdefault(block, []).append(attention_received(query[0], key[0], scaling))

    def finish(self, grid_thw: Tensor, *, merge_size: int, window: tuple[int, int] | None) -> EyeRecord:
        """Average the blocks, pool merge blocks, and undo the window order.

        Args:
            grid_thw: `(pictures, 3)` in patches.
            merge_size: patches per token and side.
            window: window and patch size in pixels, for a tower that permutes windows (Qwen2.5-VL).
        """
        self._closed = True
        per_block = [torch.cat(segments) for segments in self._segments.values()]
        patches = torch.stack(per_block).mean(0)
        tokens = patches.view(-1, merge_size**2).mean(1)
        if window is not None:
            order, _ = get_vision_window_index(grid_thw.cpu(), merge_size, *window)
            tokens = tokens[torch.argsort(order.to(tokens.device))]
        record = EyeRecord(tokens, tuple((t, h // merge_size, w // merge_size) for t, h, w in grid_thw.tolist()))
        if self._sink is not None:
            self._sink.append(record)
        return record
