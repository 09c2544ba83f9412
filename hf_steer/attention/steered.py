"""What rides through a forward pass, and what steered attention modules do with it; unsteered calls never come here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.attention.backends import PREFERRED, choose_backend
from hf_steer.attention.bias import on_device
from hf_steer.attention.share import bias_for_share
from hf_steer.errors import SteerError
from hf_steer.ground.attention_call import AttentionCall, segments_of
from hf_steer.registry import BACKENDS
from hf_steer.saliency import current_recorder
from hf_steer.values import HeadBias

STEERABLE = tuple(PREFERRED)
"""Implementations that these functions can wrap."""
Reader = Callable[[AttentionCall], None]


@dataclass(eq=False)
class SteeredCall:
    """Rides through one forward pass as the keyword argument `hf_steer`; complete before the first decoder layer runs.

    It is an argument and not a global, so that threads, and gradient checkpointing's recomputation, see their own.

    Attributes:
        biases: layer -> bias, for the layers to steer in this pass.
        backend: what the user asked for.
        read: is handed what the layers of a first pass attend with; None in a pass that is steered.
        signed: the receipt: layers that have added their bias.
        chosen: what was decided for one layer of the pass holds for those that are called alike.
    """

    biases: Mapping[int, HeadBias] = field(default_factory=dict)
    backend: str = "auto"
    read: Reader | None = None
    signed: set[int] = field(default_factory=set)
    chosen: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def over(self, layer: int, keys: int) -> HeadBias | None:
        """The bias of a layer that attends to another number of keys than was told; None where it is not known which."""
        return None


def attend_steered(call: AttentionCall, passing: SteeredCall) -> Any:
    """Attention of a decoder layer with its heads' bias; without one, the function underneath, once the call was read.

    Raises:
        SteerError: no backend can carry the bias, or the layer sees other keys than the saliency covers.
    """
    bias = call.bias
    if passing.read is not None:
        passing.read(call)
    if bias is None:
        return call.inner(call.module, call.query, call.key, call.value, call.mask, **call.options)
    layer = getattr(getattr(call.module, "config", None), "hf_steer_layer", None)
    if layer is None:  # a call that no patched model made
        layer = call.layer
    if bias.key.shape[1] != call.key.shape[2]:
        bias = call.bias = bias_over(passing, layer, bias, call.key.shape[2])
    if bias.key.device != call.key.device:
        bias = call.bias = on_device(bias, call.key.device)
    if bias.share is not None:
        bias = call.bias = bias_for_share(call, bias)
    attend = passing.chosen.get(alike := _kind_of(call))
    if attend is None:
        name = choose_backend(passing.backend, call)
        attend = passing.chosen[alike] = BACKENDS.rows[name].attend
    passing.signed.add(layer)
    output, weights = attend(call, bias)
    return (output if output.is_contiguous() else output.contiguous()), weights  # some modules look at it through .view()


def bias_over(passing: SteeredCall, layer: int, bias: HeadBias, keys: int) -> HeadBias:
    """A layer's bias over the keys that it attends to, which may be other than the cache told.

    Raises:
        SteerError: which of them the saliency speaks of is not known.
    """
    if bias.key.shape[1] == keys:
        return bias
    fitting = passing.over(layer, keys)
    if fitting is None:
        raise SteerError(
            f"layer {layer} attends to {keys} keys, the saliency covers {bias.key.shape[1]}: this kind "
            "of cache is not known to hf_steer. Use a dynamic, static or sliding cache of transformers."
        )
    return fitting


def _kind_of(call: AttentionCall) -> tuple[Any, ...]:
    """In which the layers of one pass may differ; reentrant checkpointing runs them first without gradients, then with.

    Numbers among the options count unless they are 0, all others by being there.
    """
    options = call.options.items()
    used = tuple(name for name, value in options if value is not None and not (isinstance(value, (int, float)) and not value))
    learns = call.bias is not None and call.bias.query.requires_grad
    return call.mask is None, call.causal, call.key.device, torch.is_grad_enabled(), learns, used


CURRENT_PASS: ContextVar[Any] = ContextVar("hf_steer_pass", default=None)
"""The innermost forward pass of a patched model that this thread is in; None outside of all."""


def registered_name(implementation: str, part: str, family: str) -> str:
    """Name under which a wrapper of `implementation` is registered; it keeps that name, which transformers looks for."""
    return f"hf_steer_{part}_{family}_{implementation}"


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
