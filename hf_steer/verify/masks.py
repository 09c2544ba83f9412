"""What each attention implementation's mask says of one head, entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_steer.ground.attention_call import AttentionCall
from hf_steer.ground.implementations import FLASH
from hf_steer.testing.report import CannotShow

Allowed = Callable[[int, int, Tensor], Tensor]
"""From row, head and numbers of queries to what is added to their logits, `(queries, keys)` float64: minus infinity is masked."""


def allowed_of(call: AttentionCall) -> Allowed:
    """What a call's mask says.

    Raises:
        CannotShow: a kind of mask, or an argument, that is not known here.
    """
    if call.unknown or call.paged or call.dropped:
        raise CannotShow(f"what {', '.join(call.unknown) or 'a paged cache, or dropout,'} does to attention is not known here")
    mask: Any = call.mask
    if call.implementation in FLASH and (mask is None or mask.ndim == 2):
        return lambda row, head, queries: _flash(call, row, queries)
    if mask is None:
        square = call.causal and call.queries > 1 and call.implementation != "eager"
        return lambda row, head, queries: _masked(_causal(call, queries) if square else _every(call, queries))
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return lambda row, head, queries: _given(call, mask, row, head, queries)
    if hasattr(mask, "mask_mod"):
        return lambda row, head, queries: _computed(call, mask, row, head, queries)
    raise CannotShow(f"masks of the kind {type(mask).__name__} are not known here")


def _every(call: AttentionCall, queries: Tensor) -> Tensor:
    return torch.ones(len(queries), call.key.shape[2], dtype=torch.bool)


def _causal(call: AttentionCall, queries: Tensor, *, shift: int = 0) -> Tensor:
    return torch.arange(call.key.shape[2])[None] <= queries[:, None] + shift


def _given(call: AttentionCall, mask: Tensor, row: int, head: int, queries: Tensor) -> Tensor:
    own = mask.expand(len(call.query), call.query.shape[1], -1, -1)[row, head]
    own = own[queries.to(own.device) if len(own) > 1 else [0] * len(queries), : call.key.shape[2]].cpu()
    if own.dtype == torch.bool:
        return _masked(own)
    return torch.where(own <= torch.finfo(own.dtype).min / 2, -torch.inf, own.double())


def _computed(call: AttentionCall, mask: Any, row: int, head: int, queries: Tensor) -> Tensor:
    """A block mask's own function, entry by entry."""
    keys = torch.arange(call.key.shape[2], device=call.key.device)
    own = queries.to(keys.device)
    allowed = [torch.stack([mask.mask_mod(keys.new_tensor(row), keys.new_tensor(head), q, k) for k in keys]) for q in own]
    return _masked(torch.stack(allowed).cpu())


def _flash(call: AttentionCall, row: int, queries: Tensor) -> Tensor:
    """Causal from the lower right, in a window where it has one; a mask, if there is one, says which keys are real."""
    keys, window = torch.arange(call.key.shape[2]), call.options.get("sliding_window")
    shift = len(keys) - call.queries
    allowed = _causal(call, queries, shift=shift) if call.causal else _every(call, queries)
    if window is not None:
        allowed = allowed & (keys[None] > queries[:, None] + shift - window)
    if call.mask is not None:
        allowed = allowed & call.mask[row, : len(keys)].cpu().bool()[None]
    return _masked(allowed)


def _masked(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
