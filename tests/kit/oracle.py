"""Biased attention in plain loops and fp64: what every backend has to agree with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """`softmax(scaling · q·k + bias)` over the allowed keys, head by head and query by query.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, key_value_heads, keys, head_dim)`.
        value: as key.
        allowed: `(batch, queries, keys)` bool.
        bias: `(batch, heads, queries, keys)`.
        scaling: factor on the products.

    Returns:
        `(batch, queries, heads, head_dim)` and the weights `(batch, heads, queries, keys)`, fp64.
    """
    batch, heads, queries, head_dim = query.shape
    per_group = heads // key.shape[1]
    output = torch.zeros(batch, queries, heads, head_dim, dtype=torch.float64)
    weights = torch.zeros(batch, heads, queries, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                keys = [k for k in range(key.shape[2]) if allowed[b, q, k]]
                if not keys:
                    continue
                logits = [
                    scaling * float(query[b, h, q].double() @ key[b, h // per_group, k].double()) + float(bias[b, h, q, k])
                    for k in keys
                ]
                top = max(logits)
                total = sum(math.exp(logit - top) for logit in logits)
                for k, logit in zip(keys, logits, strict=True):
                    weight = math.exp(logit - top) / total
                    weights[b, h, q, k] = weight
                    output[b, q, h] += weight * value[b, h // per_group, k].double()
    return output, weights


def rank_one(strength: Tensor, gate: Tensor, scores: Tensor) -> Tensor:
    """`λ_h · g_q · s_k`, entry by entry: `(batch, heads, queries, keys)` fp64."""
    batch, keys = scores.shape
    bias = torch.zeros(batch, len(strength), gate.shape[1], keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(len(strength)):
            for q in range(gate.shape[1]):
                for k in range(keys):
                    bias[b, h, q, k] = float(strength[h]) * float(gate[b, q]) * float(scores[b, k])
    return bias
