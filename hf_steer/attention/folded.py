"""The bias as extra channels of the head dimension: any kernel then computes the biased softmax exactly.

`q' = [q, λ_h·g_q]` and `k' = [k, s_k / scale]` give `scale · q'·k' = scale · q·k + λ_h·g_q·s_k`, with the kernel's own
causal flag, grouped heads, and no queries × keys tensor. Prior art: FlashBias (https://arxiv.org/abs/2505.12044).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.attention.bias import once
from hf_steer.ground.attention_call import AttentionCall
from hf_steer.ground.implementations import FLASH
from hf_steer.values import HeadBias

_CHANNELS_STEP = 8
"""Fused kernels want head sizes that are multiples of 8; the columns go into the padding."""
_FLASH_LIMIT = 256
"""Largest head size of the flash kernels."""


def refuse_folded(call: AttentionCall) -> str | None:
    """Why the channels cannot carry this call's bias."""
    if call.cap is not None:
        return "softcapped logits would bend a folded bias"
    if call.implementation == "eager" and _product_dtype(call.query) == torch.float16:
        return "eager attention multiplies in float16 before it scales, and float16 ends at 65504"
    if call.implementation in FLASH and call.bias is not None:
        head_dim, parts = call.query.shape[-1], 3 if _product_dtype(call.query).itemsize == 2 else 1
        if head_dim + call.bias.key.shape[-1] * parts > _FLASH_LIMIT:
            return f"heads of {head_dim} leave no room for its channels below {_FLASH_LIMIT}, where flash kernels end"
    return None


def attend_folded(call: AttentionCall, bias: HeadBias) -> tuple[Tensor, Any]:
    """Attend with the bias folded into q and k.

    Args:
        call: whose mask is handed on as it is.
        bias: low-rank bias for these heads and keys.

    Returns:
        What the function underneath returns: `(batch, queries, heads, value_dim)` and its weights, if it has any.
    """
    query, key, value = call.query, call.key, call.value
    head_dim, value_dim, dtype, scale = query.shape[-1], value.shape[-1], _product_dtype(query), call.scale
    rank = bias.key.shape[-1] * (3 if dtype.itemsize == 2 else 1)
    padding = -(head_dim + rank) % _CHANNELS_STEP
    columns = rank + padding

    def fold_query() -> Tensor:
        return F.pad(split_query(bias.query * _reach(bias.key, dtype), dtype), (0, padding))

    def fold_key() -> Tensor:
        return F.pad(split_key(bias.key / (_reach(bias.key, dtype) * scale), dtype), (0, padding))

    query_columns = once(bias.forms, ("folded", dtype, padding), fold_query, bias.query, bias.key)
    key_columns = once(bias.key_forms, ("folded", dtype, padding, scale), fold_key, bias.key)
    # fused kernels want one head size for all three; where they differ already (DeepSeek's MLA), what lies underneath knows
    widened = F.pad(value, (0, columns)) if value_dim == head_dim else value
    output, weights = call.run(
        torch.cat([query, query_columns.to(query.dtype).expand(*query.shape[:-1], columns)], dim=-1),
        torch.cat([key, key_columns.to(key.dtype)[:, None].expand(*key.shape[:-1], columns)], dim=-1),
        widened,
        call.mask,
        scale=scale,
    )
    return output[..., :value_dim], weights


def _product_dtype(query: Tensor) -> torch.dtype:
    """What the kernel multiplies in: autocast rounds 32-bit queries on its way in."""
    device = query.device.type
    if query.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return query.dtype


def _reach(key: Tensor, dtype: torch.dtype) -> Tensor | float:
    """What is moved from the keys' factor to the queries', so that raw scores beyond float16's range fit in."""
    return key.detach().abs().amax().clamp(min=1.0) if dtype == torch.float16 else 1.0


def split_query(query: Tensor, dtype: torch.dtype) -> Tensor:
    """`a, a, a'` of `(a + a')(b + b') = a·b + a·b' + a'·b`, where `a'` is what 16 bits leave out of a number.

    A 16-bit number holds 8 to 11 bits; these three products keep float32's precision. Wider numbers stay whole.
    """
    if dtype.itemsize > 2:
        return query.to(dtype)
    high = query.to(dtype)
    return torch.cat([high, high, (query - high).to(dtype)], dim=-1)


def split_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    """`b, b', b`, to go with `split_query`."""
    if dtype.itemsize > 2:
        return key.to(dtype)
    high = key.to(dtype)
    return torch.cat([high, (key - high).to(dtype), high], dim=-1)
