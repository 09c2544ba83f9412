"""The bias as an additive mask: the cheaper form for a single query, where the mask is `(batch, heads, 1, keys)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.ground.attention_call import AttentionCall
from hf_steer.values import HeadBias


def attend_masked(call: AttentionCall, bias: HeadBias) -> tuple[Tensor, Any]:
    """Attend with the dense bias added to the mask; arguments as for `attend_folded`."""
    sdpa = call.implementation == "sdpa"  # by its name: somebody may have put a wrapper in its place
    causal = call.causal and sdpa and call.queries > 1  # no mask means causal to sdpa alone
    dtype = _mask_dtype(call.query, sdpa=sdpa)

    mask = add_to_mask(bias, call.mask, dtype, causal_queries=call.queries if causal else None)
    if sdpa and call.plain and call.queries == 1 and call.added is None and call.cap is None:
        return _attend_step(call, mask)
    return call.run(call.query, call.key, call.value, mask, causal=False)


def add_to_mask(bias: HeadBias, mask: Tensor | None, dtype: torch.dtype, *, causal_queries: int | None = None) -> Tensor:
    """`(batch, heads, queries or 1, keys)`: a mask with the bias, made once for the layers of a pass that share both.

    Args:
        bias: of a layer.
        mask: that it has; see `merge_mask`.
        dtype: of the result.
        causal_queries: see `merge_mask`.
    """
    merged = bias.forms.get(("mask", dtype), ())
    found: Tensor | None = next((own for given, own in merged if given is mask), None)
    if found is None:  # the first layer, or the first of another kind with another mask, such as a window
        found = merge_mask(dense_bias(bias, dtype), mask, causal_queries=causal_queries)
        if not (bias.query.requires_grad or bias.key.requires_grad):  # see `bias.once`
            bias.forms["mask", dtype] = (*merged, (mask, found))
    return found


def _attend_step(call: AttentionCall, mask: Tensor) -> tuple[Tensor, None]:
    """sdpa for a single query per head: the heads of a group become queries of their key head, and no key is repeated."""
    batch, heads, _one, head_dim = call.query.shape
    key, value, key_heads = call.key, call.value, call.key.shape[1]
    grouped = call.query.reshape(batch, key_heads, heads // key_heads, head_dim)
    mask = mask.reshape(len(mask), key_heads, heads // key_heads, -1)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, dropout_p=call.dropped, scale=call.scale)
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


def merge_mask(bias: Tensor, mask: Tensor | None, *, causal_queries: int | None) -> Tensor:
    """Add the bias to a mask of any kind without ever opening a masked position.

    transformers hands eager a float mask and sdpa a bool mask or None. Adding a float to a bool mask would turn "masked"
    into +0 and leak the future.

    Args:
        bias: `(batch, heads, queries or 1, keys)`.
        mask: None, bool (True may attend), or float (added to the logits).
        causal_queries: how many queries there are, if no mask means causal, aligned to the top left as in sdpa; the bias may be
            one for all of them.
    """
    lowest = torch.finfo(bias.dtype).min
    if mask is None:
        if causal_queries is None:
            return bias
        mask = torch.ones(causal_queries, bias.shape[3], dtype=torch.bool, device=bias.device).tril()
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, lowest)
    return (mask + bias).clamp(min=lowest)
