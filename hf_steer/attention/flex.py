"""The bias inside FlexAttention: computed from λ and s while the kernel runs. The kernel is loaded when it is first asked for.

transformers' own `flex_attention_forward` does the rest (block masks, grouped heads, softcaps, sinks). It reads a position bias
entry by entry, and here an entry is a product of captured tensors, so a new prompt of the same shape is not compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.attention.call import AttentionCall
from hf_steer.values import HeadBias


class LowRankEntries:
    """Reads like a `(batch, heads, queries, keys)` tensor, one entry at a time, and holds none."""

    def __init__(self, bias: HeadBias, added: Any) -> None:
        self.query, self.key, self.added = bias.query.contiguous(), bias.key.contiguous(), added
        self.rows, self.queries, self.rank = self.query.shape[0] > 1, self.query.shape[2] > 1, self.key.shape[2]

    def __getitem__(self, index: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        batch, head, query, key = index
        row, place = batch if self.rows else batch * 0, query if self.queries else query * 0
        entry = self.query[row, head, place, 0] * self.key[batch, key, 0]
        for rank in range(1, self.rank):
            entry = entry + self.query[row, head, place, rank] * self.key[batch, key, rank]
        return entry if self.added is None else entry + self.added[batch, head, query, key]


def refuse_flex(call: AttentionCall) -> str | None:
    """Why FlexAttention cannot carry this call's bias."""
    from transformers.utils.import_utils import is_torch_flex_attn_available

    if not is_torch_flex_attn_available():
        return "this torch has no FlexAttention"
    if call.dropout:
        return "FlexAttention has no dropout"
    on_cpu = call.query.device.type == "cpu"
    if on_cpu and call.sinks:
        return "FlexAttention has no sinks on CPUs"
    if on_cpu and call.queries == 1:
        return "FlexAttention for a single query on CPUs does not compile, or writes outside its memory (torch 2.15)"
    if on_cpu and torch.is_grad_enabled() and (call.query.requires_grad or call.key.requires_grad or call.value.requires_grad):
        return "FlexAttention has no backward pass on CPUs"
    return None


def attend_flex(
    inner: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    bias: HeadBias,
    **kwargs: Any,
) -> Any:
    """Attend with FlexAttention; arguments as for `attend_folded`. `inner` is not called: it may be sdpa's."""
    from transformers.integrations.flex_attention import flex_attention_forward

    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = _causal_blocks(query.shape[2], key.shape[2], query.device)
    elif isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device).masked_fill(
            ~attention_mask, lowest
        )
    entries = LowRankEntries(bias, kwargs.pop("position_bias", None))
    output, _ = flex_attention_forward(module, query, key, value, attention_mask, position_bias=entries, **kwargs)  # type: ignore[arg-type]
    return output, None


@lru_cache(maxsize=8)
def _causal_blocks(queries: int, keys: int, device: torch.device) -> Any:
    """Blocks of keys that lie after all of their queries are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(causal, None, None, queries, keys, device=device)
