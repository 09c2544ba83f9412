"""How the answer's log-probability begins to change with each head's strength: all heads in one pass forwards and one backwards.

To first order, steering head h by λ_h changes log p(answer) by λ_h · ∂ log p / ∂ λ_h at λ = 0: attribution patching (Syed et al.,
https://arxiv.org/abs/2310.10348), with a bias on attention in place of an activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_steer.analysis.heads.batches import Batch, logits_after_query
from hf_steer.patching import anatomy_of, use_saliency
from hf_steer.patching.blocks import Block
from hf_steer.patching.scopes import STRENGTHS, steering_of


def slopes(model: Any, batches: Sequence[Batch]) -> Tensor:
    """Mean change of log p(answer), in nats, per λ of each head alone, at λ = 0.

    Args:
        model: patched as `steerable` leaves it. None of its parameters gets a gradient.
        batches: examples with answers.

    Returns:
        `(layers, heads)` float64.
    """
    sites = anatomy_of(model).layers
    device = next(model.parameters()).device
    total = torch.zeros(len(sites), sites[0].heads, dtype=torch.float64)
    for batch in tqdm(batches, desc=f"{'slopes':<24}", unit="batch", leave=False):
        table = torch.zeros(total.shape, device=device, requires_grad=True)
        strengths = {site.index: row for site, row in zip(sites, table, strict=True)}
        answers = torch.tensor([row.answer for row in batch.rows])
        with torch.enable_grad(), use_saliency(model, batch.statement), Block(steering_of(model), STRENGTHS, strengths):
            log_p = torch.log_softmax(logits_after_query(model, batch), -1)
            right = log_p.gather(1, answers.to(log_p.device)[:, None]).sum()
        (slope,) = torch.autograd.grad(right, [table])
        total += slope.double().cpu()
    return total / sum(len(batch.rows) for batch in batches)
