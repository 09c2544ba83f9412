"""Arguments of attention modules that are added to their logits, and how a bias per head is put into one.

For modules whose code looks no attention function up. Most take a float mask, `(batch, 1 or heads, queries, keys)`; a few want
it in another form, each of which is a row of `FORMS` or `OWN_FORMS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MASKS = ("attention_mask", "attn_mask")
"""Under which modules take a mask."""
Merge = Callable[[Tensor | None], Tensor]
"""From a mask, or none, to the mask with the bias: `(batch, heads, queries, keys)`."""
Form = Callable[[Mapping[str, Any], str, Merge], dict[str, Any]]
"""From the arguments of a call, and the mask's name, to those that change."""


class OneForAll(Tensor):
    """A mask with a layer per head for modules that first check that it has a single one, and then add it as it is."""

    # what is computed with it is an ordinary tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def size(self, dim: int | None = None) -> Any:
        """As if it were one for all heads."""
        batch, _heads, queries, keys = self.shape
        told = torch.Size((batch, 1, queries, keys))
        return told if dim is None else told[dim]


class PerRow:
    """Biases of positions, `(heads, queries, keys)` to the module that cuts and adds them, in truth with a batch before that."""

    def __init__(self, dense: Tensor) -> None:
        self.dense = dense
        self.shape = dense.shape[1:]

    def size(self, dim: int) -> int:
        """Of a dimension, the heads' being the first."""
        return self.shape[dim]

    def __getitem__(self, cut: tuple[slice, ...]) -> Tensor:
        return self.dense[(slice(None), *cut)]

    def to(self, *args: Any, **kwargs: Any) -> PerRow:
        """Elsewhere: layers may be spread over devices."""
        return PerRow(self.dense.to(*args, **kwargs))


def _plain(given: Mapping[str, Any], name: str, merge: Merge) -> dict[str, Any]:
    return {name: merge(given.get(name))}


def _unchecked(given: Mapping[str, Any], name: str, merge: Merge) -> dict[str, Any]:
    return {name: merge(given.get(name)).as_subclass(OneForAll)}


def _among_positions(given: Mapping[str, Any], name: str, merge: Merge) -> dict[str, Any]:
    """MPT's mask is bool; what it adds are biases of positions, `(heads, 1, keys)`, the same in all rows."""
    return {"position_bias": PerRow(merge(given["position_bias"][None, :, :, -given[name].shape[-1] :]))}


def _in_both_streams(given: Mapping[str, Any], name: str, merge: Merge) -> dict[str, Any]:
    """ProphetNet attends twice: as others do, and for what it predicts to the same keys and the predicting tokens' own."""
    main, ahead = merge(given.get(name)), given.get("extended_predict_attention_mask")
    bias = merge(main.new_zeros(1, 1, 1, main.shape[-1]))
    bias = F.pad(bias.expand(-1, -1, main.shape[-2], -1), (0, main.shape[-2]))[:, :, None]
    return {name: main, "extended_predict_attention_mask": bias if ahead is None else ahead + bias}


FORMS: Mapping[str, Form] = MappingProxyType({"plain": _plain, "unchecked": _unchecked})
"""Ways to take a mask, in the order in which they are tried."""
OWN_FORMS: Mapping[str, Form] = MappingProxyType(
    {"MptAttention": _among_positions, "ProphetNetNgramSelfAttention": _in_both_streams}
)
"""Class of attention modules -> the way that it alone has."""


@dataclass(frozen=True)
class Additive:
    """The argument of one class of attention modules that a bias is added to.

    Attributes:
        name: of the mask.
        form: a row of `FORMS` or `OWN_FORMS`.
        names: of the parameters of the module's forward, in order.
    """

    name: str
    form: str
    names: tuple[str, ...]

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by their names."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def added(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], merge: Merge
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with the bias among them, each where it came."""
        form = OWN_FORMS[self.form] if self.form in OWN_FORMS else FORMS[self.form]
        places, named = list(args), dict(kwargs)
        for name, value in form(self.read(args, kwargs), self.name, merge).items():
            place = self.names.index(name)
            if place < len(places):
                places[place] = value
            else:
                named[name] = value
        return tuple(places), named


def parameters_of(kind: type) -> tuple[str, ...]:
    """Names of what a module's forward takes, in order."""
    return tuple(inspect.signature(inspect.unwrap(kind.forward)).parameters)[1:]  # type: ignore[attr-defined]


def mask_of(kind: type) -> str | None:
    """The name under which a class of modules takes a mask."""
    names = parameters_of(kind)
    return next((name for name in MASKS if name in names), None)
