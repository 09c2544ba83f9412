"""Attention logits in chunks of queries: to measure attention without ever holding queries × keys for all heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_steer.attention.masked import dense_bias, merge_mask
from hf_steer.errors import SteerError
from hf_steer.ground.attention_call import AttentionCall
from hf_steer.values import HeadBias

_SCORES_PER_CHUNK = 1 << 22
"""Logits held at once: 16 MB in float32."""
READABLE = ("eager", "sdpa", "flex_attention")
"""Implementations whose masks can be read here."""


def logits_in_chunks(
    call: AttentionCall, *, queries: slice = slice(None), scores_per_chunk: int = _SCORES_PER_CHUNK
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """The layer's logits without its bias, and the bias, chunk by chunk.

    Args:
        call: what the layer attends with.
        queries: which of them; all by default.
        scores_per_chunk: bound on the logits held at once.

    Yields:
        The queries of the chunk; logits `(batch, heads, chunk, keys)` float32, the lowest number where masked; the bias in
        the same shape (its query dimension may be 1), or None.

    Raises:
        SteerError: the implementation's masks cannot be read.
    """
    if call.implementation not in READABLE:
        raise SteerError(
            f"attention cannot be read through attention implementation {call.implementation!r}; load the model with one of "
            f"{', '.join(READABLE)}."
        )
    if call.sinks:
        raise SteerError("attention cannot be read in heads with sinks (gpt-oss): a part of it goes to no token.")
    heads, count, keys = call.query.shape[1], call.query.shape[2], call.key.shape[2]
    key = call.key.float().repeat_interleave(heads // call.key.shape[1], dim=1).transpose(2, 3)
    for chunk in chunks_of(call, queries, scores_per_chunk):
        raw = call.query[:, :, chunk].float() @ key * call.scale
        if call.cap is not None:
            raw = call.cap * torch.tanh(raw / call.cap)
        if call.added is not None:
            raw = raw + (call.added if call.added.shape[2] == 1 else call.added[:, :, chunk])
        logits = merge_mask(raw, _mask_of(call, chunk, count, keys), causal_queries=None)
        bias = call.bias  # one that keeps a share is made out of these logits
        yield chunk, logits, None if bias is None or bias.share is not None else dense_bias(_cut(bias, chunk), torch.float32)


def chunks_of(
    call: AttentionCall, queries: slice = slice(None), scores_per_chunk: int = _SCORES_PER_CHUNK
) -> Iterator[slice]:
    """The queries, as many at once as the bound on their logits allows."""
    batch, heads, count, _ = call.query.shape
    first, last, _ = queries.indices(count)
    step = max(1, scores_per_chunk // (batch * heads * call.key.shape[2]))
    return (slice(start, min(start + step, last)) for start in range(first, last, step))


def _mask_of(call: AttentionCall, chunk: slice, count: int, keys: int) -> Tensor | None:
    if isinstance(call.mask, Tensor):
        return call.mask[:, :, chunk]
    if call.mask is not None:
        return _evaluated(call.mask, chunk, keys, call.query.device)
    if not call.causal or count == 1:
        return None
    positions = torch.arange(chunk.start, chunk.stop, device=call.query.device)  # aligned to the top left, as in sdpa
    return (torch.arange(keys, device=call.query.device) <= positions[:, None])[None, None]


def _evaluated(block_mask: Any, chunk: slice, keys: int, device: torch.device) -> Tensor:
    """A BlockMask's entries for some queries: `(batch, 1, chunk, keys)` bool."""
    rows = torch.arange(block_mask.shape[0], device=device)[:, None, None]
    queries = torch.arange(chunk.start, chunk.stop, device=device)[None, :, None]
    every = torch.arange(keys, device=device)[None, None, :]
    allowed: Tensor = torch.broadcast_to(block_mask.mask_mod(rows, torch.zeros_like(rows), queries, every), (
        len(rows), chunk.stop - chunk.start, keys
    ))  # fmt: skip
    return allowed[:, None]


def _cut(bias: HeadBias, chunk: slice) -> HeadBias:
    query = bias.query if bias.query.shape[2] == 1 else bias.query[:, :, chunk]
    return HeadBias(query, bias.key)
