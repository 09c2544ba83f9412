"""The ways to carry a bias, and which one to take when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hf_steer.attention.folded import attend_folded
from hf_steer.attention.masked import attend_masked
from hf_steer.errors import SteerError
from hf_steer.values import HeadBias

BACKENDS: Mapping[str, Callable[..., Any]] = MappingProxyType({"folded": attend_folded, "mask": attend_masked})

_FLOAT16_ROOM = 0.25
"""Share of float16's range that a folded product may take before scaling; beyond it the mask is exact and safe."""


def choose_backend(wanted: str, query: Tensor, bias: HeadBias, scaling: float | None) -> str:
    """Name of the backend for this call.

    Args:
        wanted: `"auto"` or a key of `BACKENDS`.
        query: `(batch, heads, queries, head_dim)`.
        bias: what is to be carried.
        scaling: factor on the logits.

    Raises:
        SteerError: the folded channel was named and would overflow float16.
    """
    if wanted == "mask" or (wanted == "auto" and query.shape[2] == 1):
        return "mask"
    if query.dtype == torch.float16:  # eager multiplies before it scales, and float16 ends at 65504
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        largest = float(bias.query.abs().amax() * bias.key.abs().amax() / scale)
        if largest > _FLOAT16_ROOM * torch.finfo(torch.float16).max:
            if wanted == "auto":
                return "mask"
            raise SteerError(
                f"backend 'folded' would overflow float16: strength times saliency over the scale reaches {largest:.0f}. "
                "Use backend='auto', which takes the mask here, a smaller strength, or bfloat16."
            )
    return "folded"
