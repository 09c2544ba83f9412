"""Look at the attention of decoder layers while a model runs, patched or not. What it computes stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor

from hf_steer.attention import AttentionCall, SteeredCall, bias_for_share, on_device
from hf_steer.errors import PatchError
from hf_steer.families import resolve
from hf_steer.ground.attention_call import called_by_name, layer_of
from hf_steer.ground.implementations import function_of, implementation_of, register_function
from hf_steer.ground.parts import Anatomy, Site
from hf_steer.patching.by_mask import refuse_unread
from hf_steer.patching.edits import SetAttentionFunction
from hf_steer.patching.gaze.begin import follow_implementation
from hf_steer.patching.gaze.receipt import pass_around
from hf_steer.patching.plan import refuse_implementation
from hf_steer.patching.scopes import STEERING, find_steering
from hf_steer.values import HeadBias

Witness = Callable[[AttentionCall], Callable[[Any], None] | None]
"""Sees what a layer is about to attend with; what it gives back, if anything, is called with what the layer's function returns."""
_READERS: ContextVar[Mapping[int, Witness]] = ContextVar("hf_steer_readers", default={})  # noqa: B039 - never mutated


def anatomy_of(model: Any) -> Anatomy:
    """Where things are in a model, patched (inside wrappers, too) or not.

    Raises:
        PatchError: not a model of a known family with a decoder.
    """
    steering = find_steering(model)
    anatomy: Anatomy = resolve(model) if steering is None else steering.plan.anatomy
    if not anatomy.layers:
        why = anatomy.reason or "; ".join(f"{name}: {own}" for name, own in anatomy.left_out.items())
        raise PatchError(f"there is no attention to look at in this {anatomy.family!r} model: {why}.")
    return anatomy


@contextmanager
def probe_attention(
    model: Any, read: Witness, *, layers: Iterable[int] | None = None, sites: Iterable[Site] | None = None
) -> Iterator[None]:
    """Hand what each decoder layer is about to attend with to `read`, in this thread, for the calls inside the block.

    The layers' attention functions are wrapped meanwhile: do not enter or leave it while other threads run the model.

    Args:
        model: a transformers model, patched or not.
        read: called once per layer and forward pass; must not change the tensors. A function that it returns is called with what
            the layer's attention function gives back: `(batch, queries, heads, value_dim)` and weights, or None.
        layers: which; all when None.
        sites: instead of those that the model's gaze steers, or would: such as `anatomy_of(model).crosses`.

    Raises:
        PatchError: unknown family, or an attention implementation that cannot be wrapped.
    """
    anatomy = anatomy_of(model)
    refuse_implementation(anatomy.decoder.config, "decoder")
    refuse_unread(anatomy)
    steering = find_steering(model)
    if steering is not None and steering.plan.strengths:
        follow_implementation(steering.gaze)  # before the probe lies over it
    every = tuple(anatomy.layers if sites is None else sites)
    chosen = {site.index for site in every} if layers is None else set(layers)
    token = _READERS.set({**_READERS.get(), id(anatomy.decoder): read})
    try:
        with ExitStack() as edits:
            for site in every:
                if site.index in chosen:
                    name = _register(site.module, anatomy.decoder)
                    edits.enter_context(SetAttentionFunction(site.module, name, layer=site.index))
            yield
    finally:
        _READERS.reset(token)


def _register(module: Any, decoder: Any) -> str:
    """Wrap the function that a module calls now, under a name of its own."""
    current, kind = implementation_of(module.config), type(module)
    inner = function_of(current, kind)
    name = f"hf_steer_probe_{id(decoder)}_{current}" + (f"_{kind.__module__}_{kind.__name__}" if current == "eager" else "")
    how: dict[str, Any] = {"inner": inner, "decoder": id(decoder), "implementation": implementation_of(decoder.config)}
    register_function(name, called_by_name(partial(probing_attention, **how)))
    return name


def _bias_over(passing: SteeredCall, layer: int, keys: int) -> HeadBias | None:
    """What the steering adds in a layer that attends to so many keys."""
    bias = passing.biases.get(layer)
    return bias if bias is None or bias.key.shape[1] == keys else passing.over(layer, keys)


def probing_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    inner: Callable[..., Any],
    decoder: int,
    implementation: str,
    **options: Any,
) -> Any:
    """Attention of a decoder layer, unchanged; the thread's reader sees its queries, keys, mask and bias first."""
    read, then = _READERS.get().get(decoder), None
    if read is not None:
        passing: SteeredCall | None = options.get(STEERING) or pass_around(module)
        bias = None if passing is None else _bias_over(passing, layer_of(module), key.shape[2])
        own = {name: value for name, value in options.items() if name != STEERING}
        call = AttentionCall(module, inner, implementation, query, key, value, mask, bias, own)
        if bias is not None and bias.share is not None:
            call.bias = bias_for_share(call, on_device(bias, key.device))
        then = read(call)
    result = inner(module, query, key, value, mask, **options)
    if then is not None:
        then(result)
    return result
