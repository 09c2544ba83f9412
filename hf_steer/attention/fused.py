"""The bias added to the logits inside a flash attention kernel of ours, forward and backward.

Nothing of size queries × keys is ever in memory. Unlike the folded channels it takes nothing from the head size, and the bias
stays float32. Prior art for low-rank biases in flash attention: FlashBias (https://arxiv.org/abs/2505.12044).
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_steer.ground.attention_call import AttentionCall
from hf_steer.values import HeadBias

_SMALLEST_HEAD, _LARGEST_HEAD, _LARGEST_RANK, _LARGEST_GRID = 16, 256, 16, 65535


def attend_fused(call: AttentionCall, bias: HeadBias) -> tuple[Tensor, None]:
    """Attend with the bias added in the kernel's registers.

    A query that may attend to nothing gets 0. A mask given together with a sliding window already contains the window.

    Args:
        call: query, key and value in float16 or bfloat16; the mask is None (causal, aligned to the top left, if the call is),
            bool (True may attend) or float (added to the logits; its dtype's lowest number hides), `(batch or 1, heads or 1,
            queries or 1, keys or 1)`. What would change the result besides is refused by `refuse_fused`.
        bias: low-rank bias for these heads and keys.

    Returns:
        `(batch, queries, heads, value_dim)`, contiguous, and None for the weights.
    """
    causal = call.causal and call.mask is None and call.queries > 1
    return _FusedAttention.apply(
        call.query, call.key, call.value, bias.query, bias.key, call.mask, float(call.scale), causal
    ), None


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias_query: Tensor,
        bias_key: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
    ) -> Tensor:
        from hf_steer.attention.fused_launch import launch_forward

        output, log_sum = launch_forward(query, key, value, bias_query, bias_key, mask, scale, causal)
        ctx.save_for_backward(query, key, value, bias_query, bias_key, mask, output, log_sum)
        ctx.scale, ctx.causal = scale, causal
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        from hf_steer.attention.fused_launch import launch_backward

        query, key, value, bias_query, bias_key, mask, output, log_sum = ctx.saved_tensors
        grads = launch_backward(
            query, key, value, bias_query, bias_key, mask, ctx.scale, ctx.causal,
            output=output, log_sum=log_sum, output_grad=output_grad, needed=ctx.needs_input_grad[:5],
        )  # fmt: skip
        return (*grads, None, None, None)


def refuse_fused(call: AttentionCall) -> str | None:
    """Why the kernel cannot carry this call's bias.

    It takes float16 and bfloat16 on NVIDIA GPUs of compute capability 8.0 and above, head and value sizes from 16 to 256
    (also different ones), ranks up to 16, and masks as `attend_fused` says. Under `TRITON_INTERPRET=1` it also takes the CPU
    and float32, for tests.
    """
    return (
        _refuse_machine(call.query.device)
        or _refuse_tensors(call.query, call.key, call.value)
        or _refuse_bias(call.query, call.key, call.bias)
        or _refuse_mask(call.query, call.key, call.mask)
        or _refuse_options(call)
    )


def _refuse_machine(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, the kernel runs on cuda"
    if torch.version.hip is not None:
        return "AMD GPUs are not supported"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"the GPU has compute capability {'.'.join(map(str, torch.cuda.get_device_capability(device)))}, 8.0 is needed"
    return None


def _refuse_tensors(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    dtypes = (torch.float16, torch.bfloat16) + (torch.float32,) * _interpreted()
    if query.dtype not in dtypes:
        return f"dtype {_name(query.dtype)}, the kernel takes {', '.join(map(_name, dtypes))}"
    if not query.dtype == key.dtype == value.dtype:
        return f"query, key and value differ in dtype: {_name(query.dtype)}, {_name(key.dtype)}, {_name(value.dtype)}"
    for name, size in (("head", query.shape[-1]), ("value", value.shape[-1])):
        if not _SMALLEST_HEAD <= size <= _LARGEST_HEAD:
            return f"{name} size {size}, the kernel takes {_SMALLEST_HEAD} to {_LARGEST_HEAD}"
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        return f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit together"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads cannot share {key.shape[1]} key-value heads evenly"
    if 0 in query.shape or 0 in key.shape:
        return "there are no queries or no keys"
    if query.shape[0] * query.shape[1] > _LARGEST_GRID:
        return f"batch times heads is {query.shape[0] * query.shape[1]}, the kernel takes up to {_LARGEST_GRID}"
    return None


def _refuse_bias(query: Tensor, key: Tensor, bias: HeadBias | None) -> str | None:
    if bias is None:
        return "there is no bias"
    (batch, heads, queries, _), keys, rank = query.shape, key.shape[2], bias.key.shape[-1]
    if rank > _LARGEST_RANK:
        return f"rank {rank}, the kernel takes up to {_LARGEST_RANK}"
    if bias.key.shape != (batch, keys, rank) or not _fits(bias.query, (batch, heads, queries, rank), alike=(1, 3)):
        return f"bias {tuple(bias.query.shape)} by {tuple(bias.key.shape)} for {batch} × {heads} × {queries} × {keys} logits"
    if bias.query.dtype != torch.float32 or bias.key.dtype != torch.float32:
        return f"bias in {_name(bias.query.dtype)} and {_name(bias.key.dtype)}, the kernel takes float32"
    return None


def _refuse_mask(query: Tensor, key: Tensor, mask: Tensor | None) -> str | None:
    if mask is None:
        return None
    if mask.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
        return f"a mask of {_name(mask.dtype)}, the kernel takes bool, float16, bfloat16, float32"
    wanted = (*query.shape[:3], key.shape[2])
    if not _fits(mask, wanted):
        return f"a mask of shape {tuple(mask.shape)} for logits of shape {wanted}"
    return "the mask wants a gradient" if mask.requires_grad and torch.is_grad_enabled() else None


def _refuse_options(call: AttentionCall) -> str | None:
    if call.dropped:
        return f"dropout {call.dropped}"
    if call.cap is not None or call.sinks or call.added is not None:
        return "the kernel knows no softcap, sinks or second bias"
    return None


def _fits(tensor: Tensor, wanted: tuple[int, ...], alike: tuple[int, ...] = ()) -> bool:
    """Whether it broadcasts to the shape, with sizes at `alike` not broadcast."""
    return tensor.dim() == len(wanted) and all(
        size == want or (size == 1 and i not in alike) for i, (size, want) in enumerate(zip(tensor.shape, wanted, strict=True))
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
