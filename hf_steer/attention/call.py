"""One call of an attention function, as the backends and the readers see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_steer.values import HeadBias


@dataclass(frozen=True)
class AttentionCall:
    """What one decoder layer is about to attend with.

    Attributes:
        layer: its number.
        implementation: the attention implementation underneath, such as `"sdpa"`.
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, key_value_heads, keys, head_dim)`.
        value: `(batch, key_value_heads, keys, value_dim)`.
        mask: as the implementation gets it: None; bool (True may attend) or float (added to the logits), `(batch or 1, heads or
            1, queries, keys)`; for flash `(batch, keys)`; for flex a BlockMask.
        scaling: factor on the logits.
        causal: whether no mask means causal.
        bias: what the steering adds to the logits; None where the layer is not steered in this pass.
        dropout: probability that a weight is dropped.
        softcap: the logits are bent by `softcap · tanh(logits / softcap)` before a mask is added; None where they are not.
        sinks: whether each head has a logit that goes to no key.
        position_bias: whether the model itself adds a bias to the logits.
        paged: whether the keys come from a paged cache, which the implementation reads itself.
    """

    layer: int
    implementation: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float
    causal: bool
    bias: HeadBias | None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: bool = False
    position_bias: bool = False
    paged: bool = False

    @property
    def queries(self) -> int:
        return self.query.shape[2]


Reader = Callable[[AttentionCall], None]


def causal_of(module: Any, is_causal: bool | None) -> bool:
    """Whether no mask means causal: as the call says, or else the module."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def call_of(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    bias: HeadBias | None,
    *,
    implementation: str,
    kwargs: Mapping[str, Any],
) -> AttentionCall:
    """From the arguments of an attention function."""
    scaling = kwargs.get("scaling")
    return AttentionCall(
        layer=module.layer_idx,
        implementation=implementation,
        query=query,
        key=key,
        value=value,
        mask=mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal_of(module, kwargs.get("is_causal")),
        bias=bias,
        dropout=kwargs.get("dropout") or 0.0,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux") is not None,
        position_bias=kwargs.get("position_bias") is not None,
        paged=kwargs.get("cache") is not None,
    )
