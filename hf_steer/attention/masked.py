"""The bias as an additive mask: the cheaper form for a single query, where the mask is `(batch, heads, 1, keys)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_steer.attention.bias import once
from hf_steer.attention.call import causal_of
from hf_steer.values import HeadBias


def attend_masked(
    inner: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    bias: HeadBias,
    **kwargs: Any,
) -> Any:
    """Attend with the dense bias added to the mask; arguments as for `attend_folded`."""
    queries, sdpa = query.shape[2], inner is sdpa_attention_forward
    # no mask means causal to sdpa alone
    causal = causal_of(module, kwargs.pop("is_causal", None)) and sdpa and queries > 1
    dtype = _mask_dtype(query, sdpa=sdpa)

    def merge() -> tuple[Tensor | None, Tensor]:
        return attention_mask, merge_mask(dense_bias(bias, dtype), attention_mask, causal_queries=queries if causal else None)

    merged_with, mask = once(bias.forms, ("mask", dtype, attention_mask is None), merge, bias.query, bias.key)
    if merged_with is not attention_mask:  # layers of another kind have another mask, such as a window
        mask = merge()[1]
    if sdpa and queries == 1 and kwargs.get("position_bias") is None and kwargs.get("softcap") is None:
        return _attend_step(query, key, value, mask, **kwargs)
    return inner(module, query, key, value, mask, is_causal=False, **kwargs)


def _attend_step(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float | None = None, dropout: float = 0.0, **_: Any
) -> tuple[Tensor, None]:
    """sdpa for a single query per head: the heads of a group become queries of their key head, and no key is repeated."""
    batch, heads, _one, head_dim = query.shape
    key_heads = key.shape[1]
    grouped = query.reshape(batch, key_heads, heads // key_heads, head_dim)
    mask = mask.reshape(len(mask), key_heads, heads // key_heads, -1)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.reshape(batch, 1, heads, value.shape[-1]), None


def _mask_dtype(query: Tensor, *, sdpa: bool) -> torch.dtype:
    """float32 where the kernel takes it beside 16-bit queries, and eager's logits are few: the bias is then not rounded."""
    wide = query.device.type == "cpu" if sdpa else query.shape[2] == 1
    return torch.promote_types(query.dtype, torch.float32) if wide else query.dtype


def dense_bias(bias: HeadBias, dtype: torch.dtype) -> Tensor:
    """`(batch, heads, queries or 1, keys)`."""
    if bias.key.shape[-1] == 1:  # an outer product
        return (bias.query * bias.key[:, None, None, :, 0]).to(dtype)
    return torch.einsum("bhqr,bkr->bhqk", bias.query.expand(len(bias.key), -1, -1, -1), bias.key).to(dtype)


def merge_mask(bias: Tensor, attention_mask: Tensor | None, *, causal_queries: int | None) -> Tensor:
    """Add the bias to a mask of any kind without ever opening a masked position.

    transformers hands eager a float mask and sdpa a bool mask or None. Adding a float to a bool mask would turn "masked"
    into +0 and leak the future.

    Args:
        bias: `(batch, heads, queries or 1, keys)`.
        attention_mask: None, bool (True may attend), or float (added to the logits).
        causal_queries: how many queries there are, if no mask means causal, aligned to the top left as in sdpa; the bias may be
            one for all of them.
    """
    lowest = torch.finfo(bias.dtype).min
    if attention_mask is None:
        if causal_queries is None:
            return bias
        attention_mask = torch.ones(causal_queries, bias.shape[3], dtype=torch.bool, device=bias.device).tril()
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, bias, lowest)
    return (attention_mask + bias).clamp(min=lowest)
