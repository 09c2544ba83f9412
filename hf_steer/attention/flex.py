"""The bias inside FlexAttention: computed from λ and s while the kernel runs. The kernel is loaded when it is first asked for.

transformers' own function does the rest (block masks, grouped heads, softcaps, sinks). It reads a position bias
entry by entry, and here an entry is a product of captured tensors, so a new prompt of the same shape is not compiled again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_steer.attention.bias import once
from hf_steer.attention.masked import merge_mask
from hf_steer.ground.attention_call import AttentionCall, flex_attention, has_flex
from hf_steer.values import HeadBias

_BLOCK = 128
"""Queries, and keys, that FlexAttention skips or takes as one."""


class Entries:
    """Reads like a `(batch, heads, queries, keys)` tensor, one entry at a time: the bias and what else is added, none of it stored.

    Args:
        bias: low-rank.
        added: `(batch or 1, heads or 1, queries or 1, keys or 1)` each.
    """

    def __init__(self, bias: HeadBias, added: Sequence[Tensor]) -> None:
        self.query, self.key, self.added = bias.query.contiguous(), bias.key.contiguous(), tuple(added)

    def __getitem__(self, index: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        row, head, place, _ = _within(index, self.query)
        entry = self.query[row, head, place, 0] * self.key[index[0], index[3], 0]
        for rank in range(1, self.key.shape[2]):
            entry = entry + self.query[row, head, place, rank] * self.key[index[0], index[3], rank]
        for tensor in self.added:
            row, head, place, key = _within(index, tensor)
            entry = entry + tensor[row, head, place, key]
        return entry


def _within(index: tuple[Tensor, ...], tensor: Tensor) -> list[Tensor]:
    """The index into a tensor that is broadcast where its size is 1."""
    return [own if size > 1 else own * 0 for own, size in zip(index, tensor.shape, strict=True)]


def refuse_flex(call: AttentionCall) -> str | None:
    """Why FlexAttention cannot carry this call's bias."""
    if not has_flex():
        return "this torch has no FlexAttention"
    if call.dropped:
        return "FlexAttention has no dropout"
    on_cpu = call.query.device.type == "cpu"
    if on_cpu and call.sinks:
        return "FlexAttention has no sinks on CPUs"
    if on_cpu and call.queries == 1:
        return "FlexAttention for a single query on CPUs does not compile, or writes outside its memory (torch 2.15)"
    if on_cpu and torch.is_grad_enabled() and (call.query.requires_grad or call.key.requires_grad or call.value.requires_grad):
        return "FlexAttention has no backward pass on CPUs"
    return None


def attend_flex(call: AttentionCall, bias: HeadBias) -> tuple[Tensor, None]:
    """Attend with FlexAttention, whatever the function underneath is: it may be sdpa's."""
    mask, query = call.mask, call.query
    added = [] if call.added is None else [call.added]
    if mask is None and call.causal and call.queries > 1:
        sizes = call.queries, call.key.shape[2], query.device
        mask = once(bias.forms, ("causal", *sizes), lambda: causal_blocks(*sizes))
    elif isinstance(mask, Tensor):  # transformers' function reads the first head's alone
        added.append(merge_mask(query.new_zeros(1, 1, 1, 1), mask, causal_queries=None))
        mask = None
    return flex_attention(call, mask, Entries(bias, added)), None


def causal_blocks(queries: int, keys: int, device: torch.device) -> Any:
    """FlexAttention's causal block mask, aligned to the top left, made without a queries × keys tensor.

    Args:
        queries: of the call.
        keys: of the call.
        device: of the mask.

    Returns:
        A `BlockMask`: which blocks of keys a block of queries sees wholly, and which in part.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    rows = torch.arange(-(-queries // _BLOCK), device=device)[:, None]
    columns = torch.arange(-(-keys // _BLOCK), device=device)
    inside = ((columns + 1) * _BLOCK <= keys) & ((rows + 1) * _BLOCK <= queries)  # the last ones may hang over
    whole, seen = (columns < rows) & inside, columns <= rows
    partly = seen & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(partly), *_listed(whole), BLOCK_SIZE=_BLOCK, mask_mod=causal, seq_lengths=(queries, keys)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their numbers, first."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None], order.int()[None, None]
