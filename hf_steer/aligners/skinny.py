"""The two products that every router consists of: features in, weighted vectors out, and nothing large in between."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_steer.errors import AlignerError

_CHUNK = 1024
"""Tokens at a time that half-precision features are widened to float32 on a CPU, which has no mixed product."""


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

    def forward(self, features: Tensor, part: slice | None = None) -> Tensor:
        """Logits `(..., outputs)` in float32 (float64 for float64), whatever precision the features are in.

        Args:
            features: `(..., features)`.
            part: which outputs to compute; None for all.
        """
        weight, bias = (self.weight, self.bias) if part is None else (self.weight[part], self.bias[part])
        check_features(features, self.weight.shape[1])
        if features.dtype in (torch.float32, torch.float64):
            return F.linear(features, weight.to(features.dtype), bias.to(features.dtype))
        flat = features.reshape(-1, features.shape[-1])
        product: Tensor = _wide_product(flat, weight.float())
        return (product + bias.float()).view(*features.shape[:-1], -1)


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


@torch.library.custom_op("hf_steer::wide_product", mutates_args=())
def _wide_product(features: Tensor, weight: Tensor) -> Tensor:
    """`features @ weight.T` for half-precision features `(tokens, features)` and float32 weight, accumulated in float32."""
    if features.is_cuda:  # rounding the weight twice, in high and low parts, keeps 16 of its bits
        high = weight.to(features.dtype)
        low = (weight - high.float()).to(features.dtype)
        both = torch.mm(features, torch.cat([high, low]).t(), out_dtype=torch.float32)
        return both[:, : weight.shape[0]] + both[:, weight.shape[0] :]
    product = features.new_empty(features.shape[0], weight.shape[0], dtype=torch.float32)
    for start in range(0, features.shape[0], _CHUNK):
        rows = slice(start, start + _CHUNK)
        torch.mm(features[rows].float(), weight.t(), out=product[rows])
    return product


@_wide_product.register_fake
def _(features: Tensor, weight: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], weight.shape[0], dtype=torch.float32)


@torch.library.custom_op("hf_steer::wide_product_weight_grad", mutates_args=())
def _weight_grad(features: Tensor, grad: Tensor) -> Tensor:
    """`grad.T @ features`, `(outputs, features)` float32, without widening all features at once."""
    total = features.new_zeros(grad.shape[1], features.shape[1], dtype=torch.float32)
    step = features.shape[0] if features.is_cuda else _CHUNK
    for start in range(0, features.shape[0], max(step, 1)):
        rows = slice(start, start + step)
        total.addmm_(grad[rows].t(), features[rows].float())
    return total


@_weight_grad.register_fake
def _(features: Tensor, grad: Tensor) -> Tensor:
    return features.new_empty(grad.shape[1], features.shape[1], dtype=torch.float32)


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    features, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    wanted = ctx.needs_input_grad  # type: ignore[attr-defined]
    to_features = grad.to(features.dtype) @ weight.to(features.dtype) if wanted[0] else None
    to_weight: Tensor | None = _weight_grad(features, grad.contiguous()) if wanted[1] else None
    return to_features, to_weight


_wide_product.register_autograd(_backward, setup_context=_remember)
