"""What rides through a forward pass, and how a layer's bias is made to fit the call that it comes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_steer.attention.backends import PREFERRED
from hf_steer.attention.bias import on_device
from hf_steer.attention.share import bias_for_share
from hf_steer.errors import SteerError
from hf_steer.ground.attention_call import AttentionCall, segments_of
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


def fit_bias(call: AttentionCall, passing: SteeredCall) -> HeadBias:
    """The bias of a layer over the keys that it attends to, where they are; of a share, as much of it as this call needs.

    Raises:
        SteerError: the layer sees other keys than the saliency covers.
    """
    assert call.bias is not None
    bias = on_device(bias_over(passing, call.layer, call.bias, call.key.shape[2]), call.key.device)
    return bias if bias.share is None else bias_for_share(call, bias)


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
