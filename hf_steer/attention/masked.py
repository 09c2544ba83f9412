"""The bias as an additive mask: the cheaper form for a single query, where the mask is `(batch, heads, 1, keys)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    queries = query.shape[2]
    mask = merge_mask(dense_bias(bias, query.dtype), attention_mask, causal_queries=queries if causal and queries > 1 else None)
    return inner(module, query, key, value, mask, is_causal=False, **kwargs)


def dense_bias(bias: HeadBias, dtype: torch.dtype) -> Tensor:
    """`(batch, heads, queries or 1, keys)`."""
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
