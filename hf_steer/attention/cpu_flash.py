"""The bias as a mask of one row, inside the CPU's flash kernel: nothing is copied, and no queries × keys tensor appears.

A bias that is the same for every query is `(batch, heads, 1, keys)`. The kernel adds such a row to every query while it heeds its
own causal flag; only `scaled_dot_product_attention` forbids the two together, so the kernel is called by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_steer.attention.masked import dense_bias
from hf_steer.ground.attention_call import AttentionCall
from hf_steer.values import HeadBias

_attend: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def refuse_cpu_flash(call: AttentionCall) -> str | None:
    """Why the kernel cannot carry this call's bias."""
    bias = call.bias
    # the switch is for CPUs, too; a compiled graph cannot ask
    if _attend is None or not (torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()):
        return "this torch has no flash attention for CPUs, or it is switched off"
    if call.query.device.type != "cpu":
        return f"the model is on {call.query.device.type!r}"
    if call.mask is not None or not call.causal or call.queries == 1:
        return "it needs a causal prompt without padding"
    if bias is None or bias.query.shape[2] > 1:
        return "the bias differs from query to query"
    if bias.query.requires_grad or bias.key.requires_grad:
        return "the kernel gives no gradient of the bias"
    if call.value.shape[-1] != call.query.shape[-1]:
        return f"heads of {call.query.shape[-1]} and values of {call.value.shape[-1]} differ"
    if not call.query.dtype == call.key.dtype == call.value.dtype:  # under autocast, which does not reach the kernel
        return "queries, keys and values are of different precision"
    if call.cap is not None or call.sinks or call.added is not None or call.dropped:
        return "the kernel knows no softcap, sinks, dropout or second bias"
    return None


def attend_on_cpu(call: AttentionCall, bias: HeadBias) -> tuple[Tensor, None]:
    """Attend causally with one row of bias per head; the function underneath is not called."""
    query, keys = call.query, call.queries  # an empty static cache has more keys: none of them may be attended to
    dtype = torch.promote_types(query.dtype, torch.float32)  # beside 16-bit queries, too, so that the bias is not rounded
    row = bias.forms.get(dtype)  # the kernel is not taken where gradients flow to the bias, so the row holds for all layers
    if row is None:
        row = bias.forms[dtype] = dense_bias(bias, dtype)
    key, value = call.key[:, :, :keys], call.value[:, :, :keys]
    output = _attend(query, key, value, 0.0, True, attn_mask=row[..., :keys], scale=call.scale)[0]
    return output.transpose(1, 2).contiguous(), None
