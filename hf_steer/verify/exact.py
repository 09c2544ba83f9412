"""Attention as the formula is written, in float64: query by query, key by key. It shares no code with what carries a bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_steer.verify.sampling import Sample


def attend_exactly(sample: Sample, *, steered: bool) -> Tensor:
    """`softmax(scale · q·k + what the model adds + λ·s)` over the values.

    Args:
        sample: one head of one row.
        steered: whether with what the steering adds.

    Returns:
        `(queries, value_dim)`; NaN for a query that may look at nothing.
    """
    rows = []
    for number, query in enumerate(sample.query):
        added = sample.added[number]
        if steered and sample.bias is not None:
            added = added + sample.bias[number]
        logits = []
        for key in range(len(sample.key)):
            product = sample.scale * float(query @ sample.key[key])
            if sample.cap is not None:
                product = sample.cap * math.tanh(product / sample.cap)
            logits.append(product + float(added[key]))
        rows.append(_average(logits, sample))
    return torch.stack(rows)


def _average(logits: Sequence[float], sample: Sample) -> Tensor:
    every = [*logits, *([] if sample.sink is None else [sample.sink])]
    top = max(every)
    if top == -math.inf or max(logits) == -math.inf:
        return torch.full_like(sample.value[0], math.nan)
    total = math.fsum(math.exp(logit - top) for logit in every)
    average = torch.zeros_like(sample.value[0])
    for logit, value in zip(logits, sample.value, strict=True):
        if logit > -math.inf:
            average += math.exp(logit - top) / total * value
    return average


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, over the queries that may look at something; 0 where there are none."""
    real = ~expected.isnan().any(1)
    if not bool(real.any()):
        return 0.0
    return float((found[real] - expected[real]).norm() / expected[real].norm().clamp(min=1e-30))
