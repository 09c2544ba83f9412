"""A share of attention that is kept: the bias that each head and query needs so that what is pointed at has it.

ψ is the share that the span has by itself in one head and query, τ the wanted one: the configured share times the query's gate and
phase factor, so a gate that is half open asks for half the share. Where ψ < τ, adding `log(τ(1 - ψ) / (ψ(1 - τ)))` to the
span's logits makes the share just τ; where ψ ≥ τ nothing is added.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_steer.attention.chunks import chunks_of, logits_in_chunks
from hf_steer.ground.attention_call import AttentionCall
from hf_steer.values import HeadBias

_MOST = 30.0
"""Largest bias: a span that has e⁻³⁰ of the attention is not looked at, whatever is added."""


def bias_for_share(call: AttentionCall, bias: HeadBias) -> HeadBias:
    """The bias of one layer in this pass, with as many rows of queries as the call has.

    Args:
        call: what the layer attends with; its logits are summed, and never held for all queries at once.
        bias: `key` is 1 for the keys of the span and 0 for others; `query` is the gate of the steered heads, 0 for the others. Of
            several columns each has its own keys and gate.
    """
    if torch.is_grad_enabled() and (call.query.requires_grad or call.key.requires_grad):  # made again in backward, piece by piece
        read = replace(call, bias=None)  # the call gets what comes of this
        needed = [checkpoint(_missing_in, read, bias, chunk, use_reentrant=False) for chunk in chunks_of(call)]
    else:
        needed = [_missing(logits, bias, chunk) for chunk, logits, _ in logits_in_chunks(call)]
    query = (bias.query > 0) * torch.cat(needed, 2)[..., None]
    return HeadBias(query, bias.key, key_forms=bias.key_forms)


def _missing_in(call: AttentionCall, bias: HeadBias, chunk: slice) -> Tensor:
    return torch.cat([_missing(logits, bias, own) for own, logits, _ in logits_in_chunks(call, queries=chunk)], 2)


def _missing(logits: Tensor, bias: HeadBias, chunk: slice) -> Tensor:
    """`(batch, heads, chunk)`: what the logits of the span lack in these queries."""
    assert bias.share is not None
    gate = bias.query if bias.query.shape[2] == 1 else bias.query[:, :, chunk]
    inside = ((gate > 0).to(bias.key.dtype) @ (bias.key > 0).to(bias.key.dtype)[:, None].transpose(2, 3)) > 0
    lowest = torch.finfo(logits.dtype).min
    seen = logits > lowest / 2  # a query that sees none of the span, or nothing else, is left alone
    own = logits.masked_fill(~(inside & seen), lowest).logsumexp(-1)
    rest = logits.masked_fill(~(~inside & seen), lowest).logsumexp(-1)
    there = (inside & seen).any(-1) & (~inside & seen).any(-1)
    missing = torch.logit(bias.share * gate.amax(-1)) - (own - rest)
    return torch.where(there, missing, torch.zeros_like(missing)).clamp(0.0, _MOST)
