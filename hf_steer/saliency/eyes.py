"""The model's own eyes: the attention that each patch receives in chosen blocks of the vision tower.

Nothing is run twice: the scores come from the queries and keys that the tower computes anyway, in chunks of queries, so
that memory grows with the number of patches and not with its square.

`vision_rollout` is attention rollout, "Quantifying Attention Flow in Transformers" (https://arxiv.org/abs/2005.00928):
`Â_l = 0.5 · A_l + 0.5 · I` per block, A the mean over heads, and `Â_L ··· Â_1` from the last chosen block to the first. They
show the row of the class token; here it is the mean over all rows, since the language model reads all patches. One row
vector is enough for that: it goes down from the last block to the first, and no patches × patches product is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.errors import SaliencyError
from hf_steer.ground.pictures import window_order
from hf_steer.registry import SOURCES

_SCORES_PER_CHUNK = 1 << 22
"""Attention weights held at once: 16 MB in float32."""


@torch.no_grad()
def attention_received(
    query: Tensor, key: Tensor, scaling: float, weights: Tensor | None = None, *, scores_per_chunk: int = _SCORES_PER_CHUNK
) -> Tensor:
    """Mean over heads of the attention that each key receives from all queries.

    Args:
        query: `(heads, patches, head_dim)`, rotary embedding applied.
        key: `(heads, patches, head_dim)`.
        scaling: factor on the logits.
        weights: `(patches,)` how much each query counts; 1 when None.
        scores_per_chunk: bound on the attention weights held at once.

    Returns:
        `(patches,)` float32, at least 0; without weights its mean is 1: a patch with 2 receives twice its even share.
    """
    heads, patches, _ = query.shape
    rows = max(1, scores_per_chunk // (heads * patches))
    keys = key.float().transpose(1, 2)
    weights = torch.ones(patches, dtype=torch.float32, device=query.device) if weights is None else weights
    received = torch.zeros(patches, dtype=torch.float32, device=query.device)
    for chunk, weight in zip(query.float().split(rows, dim=1), weights.split(rows), strict=True):
        received += weight @ torch.softmax(chunk @ keys * scaling, dim=-1).sum(0)
    return received / heads


@dataclass(frozen=True)
class EyeRecord:
    """What the tower attended to in one call.

    Attributes:
        scores: `(tokens,)` float32 over all pictures of the call, in prompt order; patches, picture by picture as the tower
            saw them, where the model has yet to arrange them (LLaVA).
        group: `(tokens,)` int64, in which picture or frame of the call each is to be normalised; -1 where it says nothing.
        grids: frames, height, width of each picture, in tokens; empty where tokens do not lie in one grid.
    """

    scores: Tensor
    group: Tensor
    grids: tuple[tuple[int, int, int], ...] = ()


Segment = tuple[Tensor, Tensor, float]
"""Patches that attend to themselves alone (a picture, a frame, a window): query, key `(heads, patches, head_dim)`, scaling."""


def averaged(blocks: Sequence[Sequence[Segment]]) -> Tensor:
    """`(patches,)` float32: the attention received, averaged over the blocks; each segment's mean is 1."""
    received = [torch.cat([attention_received(*segment) for segment in segments]) for segments in blocks]
    return torch.stack([scores.to(received[0].device) for scores in received]).mean(0)


def rolled_out(blocks: Sequence[Sequence[Segment]]) -> Tensor:
    """`(patches,)` float32: attention rollout from the last block to the first; the mean over all patches is 1.

    Segments may differ from block to block, since each goes by its place among the call's patches.
    """
    row = torch.ones(sum(query.shape[1] for query, _, _ in blocks[0]), device=blocks[-1][0][0].device)
    for segments in reversed(blocks):
        row = row.to(segments[0][0].device)
        parts = row.split([query.shape[1] for query, _, _ in segments])
        moved = [attention_received(*segment, part) for segment, part in zip(segments, parts, strict=True)]
        row = 0.5 * torch.cat(moved) + 0.5 * row
    return row


class EyeRecorder:
    """Keeps what the chosen blocks attend with during one call of the vision tower, until the call ends.

    Args:
        source: a name in `SOURCES`, of one that reads the tower.
        options: of its own.
    """

    def __init__(self, source: str, options: Mapping[str, Any] | None = None) -> None:
        self.source, self.options = source, options or {}
        self._blocks: dict[nn.Module, list[Segment]] = {}

    def add(self, block: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        """Take `(segments, heads, patches, head_dim)` of a block, in the order in which the tower runs."""
        segments = self._blocks.setdefault(block, [])
        segments += [(own_query, own_key, scaling) for own_query, own_key in zip(query.detach(), key.detach(), strict=True)]

    def scores(self) -> Tensor:
        """`(patches,)` of the whole call, in the tower's order."""
        eyes = SOURCES[self.source].eyes
        if eyes is None:
            raise SaliencyError(f"source {self.source!r} reads the prompt and not the vision tower.")
        return eyes(list(self._blocks.values()), **self.options)

    def pictures(self) -> EyeRecord:
        """The record of a tower whose every segment is a picture: all that it attended to, numbered by picture."""
        scores, segments = self.scores(), next(iter(self._blocks.values()))
        counts = torch.tensor([query.shape[1] for query, _, _ in segments], device=scores.device)
        return EyeRecord(scores, torch.arange(len(counts), device=scores.device).repeat_interleave(counts))

    def tokens(self, grids: Tensor, *, merge_size: int, window: tuple[int, int] | None) -> EyeRecord:
        """The record of a tower that reads grids: merge blocks pooled into tokens, the window order undone.

        Args:
            grids: frames, height and width of each picture in patches, `(pictures, 3)`.
            merge_size: patches per token and side.
            window: window and patch size in pixels, for a tower that permutes windows (Qwen2.5-VL).
        """
        tokens = self.scores().view(-1, merge_size**2).mean(1)
        if window is not None:
            order = window_order(grids, merge_size, *window)
            tokens = tokens[torch.argsort(order.to(tokens.device))]
        merged = tuple((t, h // merge_size, w // merge_size) for t, h, w in grids.tolist())
        frames = torch.tensor([h * w for t, h, w in merged for _ in range(t)], device=tokens.device)
        return EyeRecord(tokens, torch.arange(len(frames), device=tokens.device).repeat_interleave(frames), merged)


_RECORDER: ContextVar[EyeRecorder | None] = ContextVar("hf_steer_recorder", default=None)
"""A context variable and no argument: some towers' attention modules pass none on (SigLIP)."""


def current_recorder() -> EyeRecorder | None:
    """What watches the vision tower that runs in this thread now."""
    return _RECORDER.get()


def record_with(recorder: EyeRecorder | None) -> EyeRecorder | None:
    """Let a recorder watch the vision tower that runs next in this thread, or nothing; returns what watched before."""
    before = _RECORDER.get()
    _RECORDER.set(recorder)
    return before
