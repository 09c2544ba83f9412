"""Eager attention with edited logits: what PAI and its kind patch into a model, and PASTA up to where it adds.

PAI (https://arxiv.org/abs/2407.21771) adds to the logits of image tokens; PASTA (https://arxiv.org/abs/2311.02262) scales
weights after the softmax and renormalises them, which is the same as adding the factor's logarithm before it. Adding is one
pass over queries × keys instead of three, so this is the cheapest form of their idea.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.ground.attention_call import AttentionCall, called_by_name
from hf_steer.ground.implementations import register_function

EDITED = "hf_steer_bench_edited"


def edited_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    edited_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' `eager_attention_forward` of Llama and Qwen2 with one more addition.

    Args:
        module: the attention module.
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, key_value_heads, keys, head_dim)`.
        value: as `key`.
        mask: float, added to the logits; None where all is seen.
        edited_bias: `(batch, heads, 1, keys)`; None adds nothing.
        **options: by transformers' names.

    Returns:
        Output `(batch, queries, heads, head_dim)` and weights.
    """
    call = AttentionCall(module, edited_attention, EDITED, query, key, value, mask, None, options)
    groups = query.shape[1] // key.shape[1]
    logits = torch.matmul(query, _repeated(key, groups).transpose(2, 3)) * call.scale
    if mask is not None:
        logits = logits + mask
    if edited_bias is not None:
        logits = logits + edited_bias
    weights = nn.functional.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=call.dropped, training=module.training)
    return torch.matmul(weights, _repeated(value, groups)).transpose(1, 2).contiguous(), weights


def _repeated(tensor: Tensor, groups: int) -> Tensor:
    """Keys or values for every query head; not a copy where each has its own."""
    return tensor[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def register_edited() -> None:
    """Make it known to transformers under `EDITED`, with eager attention's mask."""
    register_function(EDITED, called_by_name(edited_attention), masked_as="eager")
