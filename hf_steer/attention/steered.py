"""What steered attention modules call instead of the function that they had; unsteered calls reach it unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.attention.backends import BACKENDS, PREFERRED, choose_backend
from hf_steer.attention.bias import on_device
from hf_steer.attention.call import Reader, call_of
from hf_steer.errors import SteerError
from hf_steer.saliency import current_recorder
from hf_steer.values import HeadBias

STEERABLE = tuple(PREFERRED)
"""Implementations that these functions can wrap."""


@dataclass
class SteeredCall:
    """Rides through one forward pass as the keyword argument `hf_steer`; complete before the first decoder layer runs.

    It is an argument and not a global, so that threads, and gradient checkpointing's recomputation, see their own.

    Attributes:
        biases: layer -> bias, for the layers to steer in this pass.
        backend: what the user asked for.
        read: is handed what the layers of a first pass attend with; None in a pass that is steered.
        chosen: what was decided for the pass's first layer holds for the others.
    """

    biases: Mapping[int, HeadBias] = field(default_factory=dict)
    backend: str = "auto"
    read: Reader | None = None
    chosen: dict[Any, Callable[..., Any]] = field(default_factory=dict)


def registered_name(implementation: str, part: str, family: str) -> str:
    """Name under which a wrapper of `implementation` is registered; it keeps that name, which transformers looks for."""
    return f"hf_steer_{part}_{family}_{implementation}"


def steered_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    inner: Callable[..., Any],
    implementation: str,
    hf_steer: SteeredCall | None = None,
    **kwargs: Any,
) -> Any:
    """Attention of a decoder layer with its heads' bias; exactly `inner` when this pass has none for the layer."""
    bias = None if hf_steer is None else hf_steer.biases.get(module.layer_idx)
    if hf_steer is not None and hf_steer.read is not None:
        hf_steer.read(call_of(module, query, key, value, attention_mask, None, implementation=implementation, kwargs=kwargs))
    if bias is None or hf_steer is None:
        return inner(module, query, key, value, attention_mask, **kwargs)
    if bias.key.shape[1] != key.shape[2]:
        raise SteerError(
            f"layer {module.layer_idx} attends to {key.shape[2]} keys, the saliency covers {bias.key.shape[1]}: this kind "
            "of cache is not known to hf_steer. Use a dynamic, static or sliding cache of transformers."
        )
    bias = on_device(bias, key.device)
    # in which the layers of one pass may differ; reentrant checkpointing runs them first without gradients, then with
    alike = attention_mask is None, key.device, torch.is_grad_enabled()
    attend = hf_steer.chosen.get(alike)
    if attend is None:
        call = call_of(module, query, key, value, attention_mask, bias, implementation=implementation, kwargs=kwargs)
        attend = hf_steer.chosen[alike] = BACKENDS[choose_backend(hf_steer.backend, call)].attend
    return attend(inner, module, query, key, value, attention_mask, bias, **kwargs)


def recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    inner: Callable[..., Any],
    **kwargs: Any,
) -> Any:
    """Attention of a vision block, unchanged; what watches the tower in this thread takes its queries and keys."""
    recorder = current_recorder()
    if recorder is not None:
        starts = kwargs.get("cu_seq_lens_q")  # flash gets all pictures of a call in one row
        lengths = [query.shape[2]] if starts is None else starts.diff().tolist()
        for own_query, own_key in zip(query.split(lengths, 2), key.split(lengths, 2), strict=True):
            recorder.add(module, own_query, own_key, kwargs["scaling"])
    return inner(module, query, key, value, attention_mask, **kwargs)
