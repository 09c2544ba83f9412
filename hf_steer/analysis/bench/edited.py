"""Eager attention with edited logits: what PAI and its kind patch into a model, and PASTA up to where it adds.

PAI (https://arxiv.org/abs/2407.21771) adds to the logits of image tokens; PASTA (https://arxiv.org/abs/2311.02262) scales
weights after the softmax and renormalises them, which is the same as adding the factor's logarithm before it. Adding is one
pass over queries × keys instead of three, so this is the cheapest form of their idea.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

EDITED = "hf_steer_bench_edited"


def edited_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    edited_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' `eager_attention_forward` of Llama and Qwen2 with one more addition.

    Args:
        module: the attention module.
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, key_value_heads, keys, head_dim)`.
        value: as `key`.
        attention_mask: float, added to the logits; None where all is seen.
        scaling: factor on the logits.
        dropout: of weights.
        edited_bias: `(batch, heads, 1, keys)`; None adds nothing.
        **kwargs: not read.

    Returns:
        Output `(batch, queries, heads, head_dim)` and weights.
    """
    groups = module.num_key_value_groups
    logits = torch.matmul(query, repeat_kv(key, groups).transpose(2, 3)) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    if edited_bias is not None:
        logits = logits + edited_bias
    weights = nn.functional.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, repeat_kv(value, groups)).transpose(1, 2).contiguous(), weights


def register_edited() -> None:
    """Make it known to transformers under `EDITED`, with eager attention's mask; a registry entry changes no model."""
    ALL_ATTENTION_FUNCTIONS.register(EDITED, edited_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(EDITED, eager_mask)
