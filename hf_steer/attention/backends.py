"""The ways to carry a bias, one row each, and which one to take when.

To add one, write a file with a function that attends and one that says when it cannot, and add a row here; the tests of
`tests/attention/test_attention.py` hold it to the oracle. For one of your own outside of hf_steer see `docs/extending/backend.md`;
it is taken where it is asked for by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_steer.attention.cpu_flash import attend_on_cpu, refuse_cpu_flash
from hf_steer.attention.flex import attend_flex, refuse_flex
from hf_steer.attention.folded import attend_folded, refuse_folded
from hf_steer.attention.fused import attend_fused, refuse_fused
from hf_steer.attention.masked import attend_masked
from hf_steer.config.attention import AUTO
from hf_steer.errors import SteerError
from hf_steer.ground.attention_call import AttentionCall
from hf_steer.ground.implementations import FLASH
from hf_steer.registry import BACKENDS, Backend
from hf_steer.values import HeadBias

OURS: Mapping[str, Backend] = {
    "folded": Backend(attend_folded, refuse_folded, ("eager", "sdpa", "flex_attention", *FLASH)),
    "mask": Backend(attend_masked, over=("eager", "sdpa")),
    "cpu_flash": Backend(attend_on_cpu, refuse_cpu_flash, ("sdpa",), instead=True),
    "flex": Backend(attend_flex, refuse_flex, ("sdpa", "flex_attention"), instead=True),
    "triton": Backend(attend_fused, refuse_fused, ("sdpa",), instead=True),
}

PREFERRED: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "eager": (("folded", "mask"), ("mask",)),
    "sdpa": (("cpu_flash", "folded", "mask"), ("mask",)),
    "flex_attention": (("flex", "folded"), ("flex", "folded")),
    **dict.fromkeys(FLASH, (("folded",), ("folded",))),
}
"""Attention implementation -> what `"auto"` tries in turn for a prompt, and for a single query; see `hf-steer bench` for why."""


def attend_for(wanted: str, call: AttentionCall) -> Callable[[AttentionCall, HeadBias], tuple[Tensor, Any]]:
    """What attends with this call's bias; see `choose_backend`."""
    return BACKENDS.rows[choose_backend(wanted, call)].attend


def choose_backend(wanted: str, call: AttentionCall) -> str:
    """Name of the backend for this call: the wanted one, or another that gives the same result, which is said once.

    Args:
        wanted: `"auto"` or a name in `BACKENDS`.
        call: what is to be carried.

    Raises:
        SteerError: no backend can carry the bias.
    """
    if call.paged:
        raise SteerError(
            "the keys are in a paged cache, whose order hf_steer does not know; use generate without continuous batching, or run "
            "inside disable_steering(model)."
        )
    if call.unknown:
        raise SteerError(
            f"layer {call.layer} calls its attention with {', '.join(call.unknown)}, and what that does to the logits is not known "
            "to hf_steer; to add a bias would be a guess. Load the model without it, or run inside disable_steering(model)."
        )
    prompt, step = PREFERRED[call.implementation]
    reasons: dict[str, str | None] = {}
    wished: tuple[str, ...] = () if wanted == AUTO else (wanted,)
    for name in wished + (prompt if call.queries > 1 else step):
        reasons[name] = refuse(name, call)
        if reasons[name] is None:
            if wanted not in (AUTO, name) and not torch.compiler.is_compiling():
                say_once(f"backend {wanted!r} gives way to {name!r}, with the same result: {reasons[wanted]}.")
            return name
    why = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
    raise SteerError(
        f"no backend can carry the bias through attention implementation {call.implementation!r} ({why}). Load the model with "
        "attn_implementation='eager', or 'sdpa' where it has that."
    )


def refuse(name: str, call: AttentionCall) -> str | None:
    """Why a backend cannot carry this call's bias; None where it can."""
    backend = BACKENDS.rows.get(name) or BACKENDS[name]
    if call.implementation not in backend.over:
        return f"it does not know the masks of {call.implementation!r}"
    if backend.instead and not call.plain:
        return f"it would pass over the function that is registered as {call.implementation!r} in place of transformers' own"
    return None if backend.refuse is None else backend.refuse(call)


@cache
def say_once(message: str) -> None:
    """Warn, once per message and process; `say_once.cache_clear()` lets all be said anew."""
    warnings.warn(message, stacklevel=2)
