"""Attention logits in chunks of queries: to measure attention without ever holding queries × keys for all heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_steer.attention.masked import dense_bias, merge_mask
from hf_steer.values import HeadBias

_SCORES_PER_CHUNK = 1 << 22
"""Logits held at once: 16 MB in float32."""


@dataclass(frozen=True)
class AttentionCall:
    """What one decoder layer is about to attend with.

    Attributes:
        layer: its number.
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, key_value_heads, keys, head_dim)`.
        mask: None, bool (True may attend) or float (added to the logits), `(batch or 1, heads or 1, queries, keys)`.
        scaling: factor on the logits.
        causal: whether no mask means causal.
        bias: what the steering adds to the logits; None where the layer is not steered in this pass.
    """

    layer: int
    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    causal: bool
    bias: HeadBias | None


Reader = Callable[[AttentionCall], None]


def call_of(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, bias: HeadBias | None, kwargs: Mapping[str, Any]
) -> AttentionCall:
    """From the arguments of an attention function."""
    scaling, causal = kwargs.get("scaling"), kwargs.get("is_causal")
    return AttentionCall(
        layer=module.layer_idx,
        query=query,
        key=key,
        mask=mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=getattr(module, "is_causal", True) if causal is None else causal,
        bias=bias,
    )


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
    """
    batch, heads, count, _ = call.query.shape
    keys = call.key.shape[2]
    key = call.key.float().repeat_interleave(heads // call.key.shape[1], dim=1).transpose(2, 3)
    first, last, _ = queries.indices(count)
    step = max(1, scores_per_chunk // (batch * heads * keys))
    for start in range(first, last, step):
        chunk = slice(start, min(start + step, last))
        raw = call.query[:, :, chunk].float() @ key * call.scaling
        logits = merge_mask(raw, _mask_of(call, chunk, count, keys), causal_queries=None)
        yield chunk, logits, None if call.bias is None else dense_bias(_cut(call.bias, chunk), torch.float32)


def _mask_of(call: AttentionCall, chunk: slice, count: int, keys: int) -> Tensor | None:
    if call.mask is not None:
        return call.mask[:, :, chunk]
    if not call.causal or count == 1:
        return None
    positions = torch.arange(chunk.start, chunk.stop, device=call.query.device)  # aligned to the top left, as in sdpa
    return (torch.arange(keys, device=call.query.device) <= positions[:, None])[None, None]


def _cut(bias: HeadBias, chunk: slice) -> HeadBias:
    query = bias.query if bias.query.shape[2] == 1 else bias.query[:, :, chunk]
    return HeadBias(query, bias.key)
