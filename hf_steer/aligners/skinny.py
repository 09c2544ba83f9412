"""The two products that every router consists of: features in, weighted vectors out, and nothing large in between."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_steer.errors import AlignerError


class Router(nn.Module):
    """All routing logits of an aligner from one product. Not an `nn.Linear`, so that PEFT's `all-linear` lets it be.

    Args:
        features: size of a token, at least 1.
        outputs: how many logits, at least 1.
    """

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, features))
        self.bias = nn.Parameter(torch.empty(outputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = features**-0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, features: Tensor, part: slice | None = None) -> tuple[Tensor, Tensor]:
        """Logits in float32 (float64 for float64), whatever precision the features are in, and the features to go on with.

        Sums and all that follows (softmax, selection, statistics) are in float32; see `_wide_product` for what a CPU rounds
        under half precision.

        Going on with the features that come back lets the backward pass add its two ways to them in one product.

        Args:
            features: `(..., features)`.
            part: which outputs to compute; None for all.

        Returns:
            `(..., outputs)`, and the features themselves.
        """
        weight, bias = (self.weight, self.bias) if part is None else (self.weight[part], self.bias[part])
        check_features(features, self.weight.shape[1])
        flat = features.reshape(-1, features.shape[-1])
        wide = torch.promote_types(features.dtype, torch.float32)
        logits, carried = _Carry.apply(flat, weight.to(wide), bias.to(wide))
        return logits.view(*features.shape[:-1], -1), carried.view(features.shape)


class _Carry(torch.autograd.Function):
    """`features @ weight.T + bias` in float32 or wider, with the features handed through."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(features, weight)
        ctx.set_materialize_grads(False)
        if features.dtype == weight.dtype:
            return torch.addmm(bias, features, weight.t()), features.view_as(features)
        return _wide_product(features, weight) + bias, features.view_as(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_logits: Tensor | None, to_carried: Tensor | None) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        if to_logits is None:
            return to_carried, None, None
        narrow = to_logits.to(features.dtype)
        to_features = None
        if ctx.needs_input_grad[0]:
            own = weight.to(features.dtype)
            to_features = narrow @ own if to_carried is None else torch.addmm(to_carried, narrow, own)
        to_weight = (narrow.t() @ features).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return to_features, to_weight, to_logits.sum(0) if ctx.needs_input_grad[2] else None


def _wide_product(features: Tensor, weight: Tensor) -> Tensor:
    """`features @ weight.T` in float32 for half-precision features, without widening them.

    A GPU hands out the sums as it keeps them, in float32, and gets the weight in two halves that hold 16 of its bits. A CPU
    rounds the sums to the features' precision, so that one rounded weight is as good.
    """
    high = weight.to(features.dtype)
    if not features.is_cuda:
        return (features @ high.t()).float()
    both = torch.cat([high, (weight - high.float()).to(features.dtype)])
    product = torch.mm(features, both.t(), out_dtype=torch.float32)
    return product[:, : weight.shape[0]] + product[:, weight.shape[0] :]


def check_features(features: Tensor, expected: int, *, what: str = "features") -> None:
    """AlignerError when a token has another size."""
    if features.ndim == 0 or features.shape[-1] != expected:
        raise AlignerError(
            f"{what} of shape {tuple(features.shape)} came; this aligner was built for a last dimension of {expected}. "
            "Build it with the encoder's own size (config.hidden_size, or d_model)."
        )


def add_steering(features: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
    """`features + weights @ vectors`, out of one kernel, in the features' precision.

    Args:
        features: `(..., features)`.
        weights: `(..., experts)`.
        vectors: `(experts, features)`.

    Returns:
        `(..., features)`, equal to the last bit where the vectors are zero.
    """
    flat = features.reshape(-1, features.shape[-1])
    steered = torch.addmm(flat, weights.reshape(flat.shape[0], -1).to(flat.dtype), vectors.to(flat.dtype))
    return steered.view(features.shape)


def full_precision(features: Tensor) -> torch.autocast:
    """Autocast off: it would round the routing, and change the precision of what passes through."""
    return torch.autocast(features.device.type, enabled=False)
