"""Runs the kernels of `fused_kernels`: grids, tiles and strides. Imported only when they run."""

# mypy: disable-error-code="import-untyped,import-not-found"
# triton has no types

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton
from torch import Tensor

from hf_steer.attention.fused_kernels import (
    BOOL_MASK,
    FLOAT_MASK,
    HIDDEN,
    INTERPRETED,
    NO_MASK,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)

Tiling = tuple[int, int, int, int]
"""Queries per tile, keys per tile, warps, loads in flight."""

_ROOMY_BYTES = 160 * 1024
"""Shared memory that a block may have on data-centre GPUs (A100: 163 KB, H100: 227 KB); others have 99 KB."""

TILINGS: Mapping[tuple[int, bool], tuple[Tiling, Tiling, Tiling]] = MappingProxyType({
    (64, True): ((128, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
    (128, True): ((128, 64, 8, 3), (64, 64, 4, 2), (32, 128, 8, 2)),
    (256, True): ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    (64, False): ((128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
    (128, False): ((64, 32, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
    (256, False): ((32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1)),
})  # fmt: skip
"""(Padded head size, much shared memory and no mask) -> tiles of the forward, the query gradient and the key gradient kernel.

Chosen by what the compiler reports for compute capabilities 8.0, 8.6 and 9.0: that registers hardly spill, shared memory fits.
"""

_INTERPRETED_TILING = (32, 32, 1, 1)
_FEW_QUERIES = 16
"""The smallest tile that a tensor core takes; enough while a model generates."""


def launch_forward(
    query: Tensor, key: Tensor, value: Tensor, bias_query: Tensor, bias_key: Tensor, mask: Tensor | None, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, key_value_heads, keys, head_dim)`.
        value: `(batch, key_value_heads, keys, value_dim)`.
        bias_query: `(batch or 1, heads, queries or 1, rank)`.
        bias_key: `(batch, keys, rank)`.
        mask: None, bool or float, 4 dimensions, each of the logits' size or 1.
        scale: factor on the products.
        causal: whether a query sees nothing after itself, from the top left.

    Returns:
        Output `(batch, queries, heads, value_dim)` and base-2 log-sum-exp `(batch, heads, queries)` float32.
    """
    query, key, value = (_with_rows(tensor) for tensor in (query, key, value))
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, value.shape[3])
    log_sum = query.new_empty(batch, heads, queries, dtype=torch.float32)
    tiling = _tiling(query, value, 0, mask is not None)
    with torch.cuda.device_of(query):
        forward_kernel[triton.cdiv(queries, tiling["BLOCK_M"]), batch * heads](
            *_inputs(query, key, value, bias_query, bias_key, mask),
            _strided(output.transpose(1, 2)),
            log_sum,
            *_numbers(query, key, mask, scale),
            **_constants(query, value, bias_key, mask, causal),
            **tiling,
        )
    return output, log_sum


def launch_backward(
    query: Tensor, key: Tensor, value: Tensor, bias_query: Tensor, bias_key: Tensor, mask: Tensor | None, scale: float,
    causal: bool, *, output: Tensor, log_sum: Tensor, output_grad: Tensor, needed: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of query, key, value, bias_query and bias_key; None for those not needed."""
    query, key, value = (_with_rows(tensor) for tensor in (query, key, value))
    (batch, heads, queries, _), (_, key_heads, keys, rank) = query.shape, (*key.shape[:3], bias_key.shape[2])
    grads = [torch.empty_like(tensor) if need else None for tensor, need in zip((query, key, value), needed[:3], strict=True)]
    query_grad, key_grad, value_grad = grads
    query_columns = log_sum.new_empty(batch, heads, queries, rank) if needed[3] else None
    key_columns = log_sum.new_empty(batch, key_heads, keys, rank) if needed[4] else None
    delta = torch.empty_like(log_sum)
    inputs, numbers = _inputs(query, key, value, bias_query, bias_key, mask), _numbers(query, key, mask, scale)
    constants = _constants(query, value, bias_key, mask, causal) | {"RANKS": triton.next_power_of_2(rank)}
    upstream = _strided(_with_rows(output_grad.transpose(1, 2)))
    with torch.cuda.device_of(query):
        tiling = _tiling(query, value, 1, mask is not None)
        query_gradient_kernel[triton.cdiv(queries, tiling["BLOCK_M"]), batch * heads](
            *inputs, _strided(output.transpose(1, 2)), upstream, log_sum, delta, _strided(query_grad), _strided(query_columns),
            *numbers, **constants, **tiling, NEEDS_QUERY=needed[0], NEEDS_BIAS=needed[3],
        )  # fmt: skip
        tiling = _tiling(query, value, 2, mask is not None)
        if needed[1] or needed[2] or needed[4]:
            key_gradient_kernel[triton.cdiv(keys, tiling["BLOCK_N"]), batch * key_heads](
                *inputs, upstream, log_sum, delta, _strided(key_grad), _strided(value_grad), _strided(key_columns),
                *numbers, **constants, **tiling, NEEDS_KEY=needed[1], NEEDS_VALUE=needed[2], NEEDS_BIAS=needed[4],
            )  # fmt: skip
    bias_query_grad = None if query_columns is None else query_columns.sum_to_size(bias_query.shape)
    return query_grad, key_grad, value_grad, bias_query_grad, None if key_columns is None else key_columns.sum(1)


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, bias_query: Tensor, bias_key: Tensor, mask: Tensor | None
) -> tuple[Any, ...]:
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return tuple(_strided(tensor) for tensor in (query, key, value, bias_query, bias_key, mask))


def _numbers(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> tuple[int | float, ...]:
    """Queries, keys, heads, heads per key-value head, scale, and the number from which down a float mask hides."""
    is_float = mask is not None and mask.dtype.is_floating_point
    floor = max(torch.finfo(mask.dtype).min / 2, HIDDEN.value) if mask is not None and is_float else 0.0
    return query.shape[2], key.shape[2], query.shape[1], query.shape[1] // key.shape[1], scale, floor


def _constants(query: Tensor, value: Tensor, bias_key: Tensor, mask: Tensor | None, causal: bool) -> dict[str, Any]:
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK
    return {
        "HEAD": query.shape[3],
        "HEAD_WIDTH": triton.next_power_of_2(query.shape[3]),
        "VALUE": value.shape[3],
        "VALUE_WIDTH": triton.next_power_of_2(value.shape[3]),
        "RANK": bias_key.shape[2],
        "MASK": kind.value,
        "CAUSAL": causal,
    }


def _tiling(query: Tensor, value: Tensor, kernel: int, masked: bool) -> dict[str, int]:
    if INTERPRETED:
        queries, keys, warps, stages = _INTERPRETED_TILING
    else:
        width = triton.next_power_of_2(max(64, query.shape[3], value.shape[3]))
        device: Any = torch.cuda.get_device_properties(query.device)  # the stubs of torch < 2.15 do not know the next name
        roomy = device.shared_memory_per_block_optin >= _ROOMY_BYTES
        queries, keys, warps, stages = TILINGS[width, roomy and not masked][kernel]  # a mask takes registers
        if kernel == 0 and query.shape[2] <= _FEW_QUERIES:
            queries, warps = _FEW_QUERIES, 4
    return {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _with_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strided(tensor: Tensor | None) -> tuple[Any, ...]:
    """The tensor and its strides, 0 where it is broadcast; nothing to look at for None."""
    if tensor is None:
        return (0, 0, 0, 0, 0)
    return (tensor, *(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)))
