"""What steered attention modules call instead of the function that they had; unsteered calls reach it unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.attention.backends import PREFERRED, choose_backend
from hf_steer.attention.bias import on_device
from hf_steer.errors import PatchError, SteerError
from hf_steer.ground.attention_call import AttentionCall, layer_of, segments_of
from hf_steer.registry import BACKENDS
from hf_steer.saliency import current_recorder
from hf_steer.values import HeadBias

STEERABLE = tuple(PREFERRED)
"""Implementations that these functions can wrap."""
Reader = Callable[[AttentionCall], None]
Stray = Callable[[Any, Mapping[str, Any]], None]
"""Judges a module and its options in a call outside of every pass."""


@dataclass
class SteeredCall:
    """Rides through one forward pass as the keyword argument `hf_steer`; complete before the first decoder layer runs.

    It is an argument and not a global, so that threads, and gradient checkpointing's recomputation, see their own.

    Attributes:
        biases: layer -> bias, for the layers to steer in this pass.
        backend: what the user asked for.
        read: is handed what the layers of a first pass attend with; None in a pass that is steered.
        sites: layer -> attention module, of the steered layers.
        signed: the receipt: layers that have added their bias.
        chosen: what was decided for one layer of the pass holds for those that are called alike.
    """

    biases: Mapping[int, HeadBias] = field(default_factory=dict)
    backend: str = "auto"
    read: Reader | None = None
    sites: Mapping[int, nn.Module] = field(default_factory=dict)
    signed: set[int] = field(default_factory=set)
    chosen: dict[Any, Callable[..., Any]] = field(default_factory=dict)


UNSTEERED = SteeredCall()
"""Stands for a pass of a patched decoder in which nothing is to be steered."""
_CURRENT: ContextVar[SteeredCall | None] = ContextVar("hf_steer_pass", default=None)
"""The decoder pass that this thread is in: a layer that was to be steered, and comes without the keyword, has lost it."""


def enter_pass(ride: SteeredCall | None) -> None:
    """A patched decoder begins a pass, or with None has ended it; a compiled graph cannot keep such a note."""
    if not torch.compiler.is_compiling():
        _CURRENT.set(ride)


def registered_name(implementation: str, part: str, family: str) -> str:
    """Name under which a wrapper of `implementation` is registered; it keeps that name, which transformers looks for."""
    return f"hf_steer_{part}_{family}_{implementation}"


def steered_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    inner: Callable[..., Any],
    implementation: str,
    stray: Stray | None = None,
    hf_steer: SteeredCall | None = None,
    **options: Any,
) -> Any:
    """Attention of a decoder layer with its heads' bias; exactly `inner` when this pass has none for the layer.

    Raises:
        PatchError: the keyword that carries the bias was lost on the way here.
        SteerError: no backend can carry it, or the layer sees other keys than the saliency covers.
    """
    if hf_steer is None:
        _refuse_lost(module, options, stray)
        return inner(module, query, key, value, mask, **options)
    layer = layer_of(module)
    bias = hf_steer.biases.get(layer)
    if hf_steer.read is not None:
        hf_steer.read(AttentionCall(module, inner, implementation, query, key, value, mask, None, options))
    if bias is None:
        return inner(module, query, key, value, mask, **options)
    if bias.key.shape[1] != key.shape[2]:
        raise SteerError(
            f"layer {layer} attends to {key.shape[2]} keys, the saliency covers {bias.key.shape[1]}: this kind "
            "of cache is not known to hf_steer. Use a dynamic, static or sliding cache of transformers."
        )
    bias = on_device(bias, key.device)
    call = AttentionCall(module, inner, implementation, query, key, value, mask, bias, options)
    # in which the layers of one pass may differ; reentrant checkpointing runs them first without gradients, then with
    alike = mask is None, key.device, torch.is_grad_enabled(), call.alters
    attend = hf_steer.chosen.get(alike)
    if attend is None:
        attend = hf_steer.chosen[alike] = BACKENDS[choose_backend(hf_steer.backend, call)].attend
    hf_steer.signed.add(layer)
    return attend(call, bias)


def _refuse_lost(module: Any, options: Mapping[str, Any], stray: Stray | None) -> None:
    """A call without the keyword is right where nothing is steered; where something is, somebody dropped it."""
    if torch.compiler.is_compiling():
        return
    current = _CURRENT.get()
    if current is None:
        if stray is not None:
            stray(module, options)
        return
    layer = layer_of(module)
    if layer in current.biases and current.sites.get(layer) is module:
        raise PatchError(
            f"layer {layer} was to be steered, and its attention was called without the keyword 'hf_steer' that carries the bias: "
            "something between decoder and attention (a hook, a wrapper, a layer with a forward of its own) does not hand "
            "keyword arguments on. Let it pass **kwargs through, or run inside disable_steering(model)."
        )


def recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    inner: Callable[..., Any],
    **options: Any,
) -> Any:
    """Attention of a vision block, unchanged; what watches the tower in this thread takes its queries and keys."""
    recorder = current_recorder()
    if recorder is not None:
        lengths = segments_of(options, query.shape[2])
        scale = AttentionCall(module, inner, "", query, key, value, mask, None, options).scale
        for own_query, own_key in zip(query.split(lengths, 2), key.split(lengths, 2), strict=True):
            recorder.add(module, own_query, own_key, scale)
    return inner(module, query, key, value, mask, **options)
