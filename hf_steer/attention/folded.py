"""The bias as extra channels of the head dimension: any kernel then computes the biased softmax exactly.

`q' = [q, λ_h·g_q]` and `k' = [k, s_k / scale]` give `scale · q'·k' = scale · q·k + λ_h·g_q·s_k`, with the kernel's own
causal flag, grouped heads, and no queries × keys tensor. Prior art: FlashBias (https://arxiv.org/abs/2505.12044).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_steer.values import HeadBias

_CHANNELS_STEP = 8
"""Fused kernels want head sizes that are multiples of 8; the columns go into the padding."""


def attend_folded(
    inner: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    bias: HeadBias,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """Attend with the bias folded into q and k.

    Args:
        inner: the attention function that the model had.
        module: the attention module, handed on to `inner`.
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, key_value_heads, keys, head_dim)`.
        value: as `key`.
        attention_mask: whatever `inner` takes; not looked at.
        bias: low-rank bias for these heads and keys.
        scaling: factor on the logits; `head_dim**-0.5` when None.
        **kwargs: handed on to `inner`.
    """
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scaling is None else scaling
    query_columns, key_columns = split_columns(bias.query, bias.key / scale, query.dtype)
    rank = query_columns.shape[-1]
    padding = -(head_dim + rank) % _CHANNELS_STEP
    query_columns = F.pad(query_columns, (0, padding)).expand(*query.shape[:-1], rank + padding)
    key_columns = F.pad(key_columns, (0, padding))[:, None].expand(*key.shape[:-1], rank + padding)
    output, weights = inner(
        module,
        torch.cat([query, query_columns], dim=-1),
        torch.cat([key, key_columns], dim=-1),
        # fused kernels want one head size for all three; a no-op for those that do not
        F.pad(value, (0, rank + padding)),
        attention_mask,
        scaling=scale,
        **kwargs,
    )
    return output[..., :head_dim], weights


def split_columns(query: Tensor, key: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns in the kernel's dtype whose product keeps float32's precision.

    A 16-bit number holds 8 to 11 bits, so each factor is split into a high and a low part, `(a + a')(b + b')`, of which
    three products matter: `a·b + a·b' + a'·b`.
    """
    if dtype == torch.float32:
        return query, key
    if dtype == torch.float64:
        return query.double(), key.double()
    query_high, key_high = query.to(dtype), key.to(dtype)
    query_low, key_low = (query - query_high).to(dtype), (key - key_high).to(dtype)
    return torch.cat([query_high, query_high, query_low], dim=-1), torch.cat([key_high, key_low, key_high], dim=-1)
