"""The gates, a row each: what is measured of a next-token distribution, or what is read in the tokens.

To add one, add a row here, and a test; for one of your own outside of hf_steer see `docs/extending/gate.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from hf_steer.config import GateConfig
from hf_steer.gating import Track
from hf_steer.registry import Gate


def normalised_entropy(logits: Tensor) -> Tensor:
    """`(rows, vocabulary)` -> `(rows,)` float32 in [0, 1]: entropy over the logarithm of the vocabulary's size."""
    log_p = torch.log_softmax(logits.float(), -1)
    # a token that is ruled out has log p = -inf and adds nothing
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1) / math.log(logits.shape[-1])


def probability_margin(logits: Tensor) -> Tensor:
    """`(rows, vocabulary)` -> `(rows,)` float32 in [0, 1]: how much likelier the likeliest token is than the next."""
    best, second = torch.softmax(logits.float(), -1).topk(2, -1).values.unbind(-1)
    return best - second


def since_phrase(track: Track, gate: GateConfig) -> Tensor:
    """`(rows, queries)`: 1 for `hold_tokens` tokens after a phrase; for a soft gate falling to 0 over them."""
    hold = float(gate.hold_tokens or 1)
    return (1 - track.age / hold).clamp(min=0) if gate.soft else (track.age < hold).float()


OURS: Mapping[str, Gate] = MappingProxyType(
    {
        "entropy": Gate(
            measures=normalised_entropy,
            options={"threshold": 0.15, "release": 0.1},
            zscore={"threshold": 1.5, "release": 0.5},
        ),
        "margin": Gate(measures=probability_margin, options={"threshold": 0.2, "release": 0.4}, falls=True),
        "self_report": Gate(
            reads=since_phrase, options={"phrases": ("wait", "not sure", "let me check"), "hold_tokens": 16}
        ),
    }
)
