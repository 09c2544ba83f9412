"""Entropy and divergence of distributions that come as log-probabilities, exact enough in float32 for small effects."""

from __future__ import annotations

import torch
from torch import Tensor

_LOWEST = -87.0
"""Logarithm of float32's smallest normal number: below it CPUs take several times as long for an exponential."""


def probabilities(log_p: Tensor) -> Tensor:
    """`exp(log_p)`, exactly 0 where it would be below 1e-38."""
    return log_p.clamp(min=_LOWEST).exp() * (log_p > _LOWEST)


def entropy_nats(log_p: Tensor) -> Tensor:
    """Entropy over the last dimension.

    Args:
        log_p: `(..., outcomes)` log-probabilities; -inf where impossible.

    Returns:
        `(...)`, at least 0.
    """
    p = probabilities(log_p)
    return -torch.where(p > 0, p * log_p, 0).sum(-1)


def kl_nats(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p ‖ q)` over the last dimension.

    Args:
        log_p: `(..., outcomes)` log-probabilities; -inf where impossible.
        log_q: likewise.

    Returns:
        `(...)`, at least 0 but for rounding; infinite where `q` excludes what `p` allows.
    """
    p, q = probabilities(log_p), probabilities(log_q)
    # each term of Σ p·log(p/q) - p + q is at least 0, and what rounding left in the normalisation cancels: on 1024 keys in
    # float32 a KL of 1e-5 comes out to 0.05 %, where Σ p·log(p/q) is off by 5 %
    return torch.where(p > 0, p * (log_p - log_q) - p + q, q).sum(-1)
