"""How large a feature is where a part of a model reads it, told by the weights that meet it first."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_steer.ground.flow import follow

DEPTH = 9
"""How far into a part its parts are looked at."""


@dataclass(frozen=True)
class Width:
    """What the first weights that a feature meets take.

    Attributes:
        size: features into them.
        reshaped: whether some may have been joined before.
        last: whether features are the last dimension there, as everywhere but in a convolution.
    """

    size: int
    reshaped: bool = False
    last: bool = True


def width_into(module: Any, argument: int | str = 0, depth: int = DEPTH) -> Width | None:
    """Size of the features that a module reads.

    Args:
        module: the part.
        argument: which of its arguments the features are, by place or by name.
        depth: how far to look into it.

    Returns:
        What its first weights take; None where that is not to be told.
    """
    if depth == 0 or (own := _of_leaf(module)) is not None:
        return None if depth == 0 else own
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        first = next((child for child in module if next(child.parameters(), None) is not None), None)
        return None if first is None else width_into(first, argument, depth - 1)
    name = argument_name(module, argument)
    found: Width | None = None
    for call in () if name is None else follow(module, "forward", (name,)).calls:
        read = call.reads(f"={name}")
        inner = None if read is None else width_into(module.get_submodule(call.part), read[0], depth - 1)
        if read is not None and inner is not None:
            may = any(came.reshaped for came in dict(call.arguments)[read[0]] if came.part == f"={name}")
            width = Width(inner.size, inner.reshaped or may, inner.last)
            found = width if found is None or (found.reshaped and not width.reshaped) else found
    return found


def argument_name(module: nn.Module, argument: int | str) -> str | None:
    """The name of an argument of a module's forward; None where it has none at that place."""
    if isinstance(argument, str):
        return argument
    names = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]
    return names[argument] if argument < len(names) else None


def is_norm(module: nn.Module) -> bool:
    """Whether all that a module has is a number per feature."""
    return all(parameter.ndim < 2 for parameter in module.parameters())


def _of_leaf(module: Any) -> Width | None:
    """Features into a module that has weights of its own, and none in parts of it."""
    if isinstance(module, nn.MultiheadAttention):
        return Width(module.embed_dim)
    if any(next(child.parameters(), None) is not None for child in module.children()):
        return None
    if isinstance(getattr(module, "in_channels", None), int):
        return Width(module.in_channels, last=False)
    if isinstance(getattr(module, "in_features", None), int):  # a quantized layer's weight has another shape
        return Width(module.in_features)
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    weight = module._parameters.get("weight", own[0] if len(own) == 1 else None)
    if weight is None or weight.ndim > 2:
        return None
    return Width(int(weight.shape[0] if isinstance(module, nn.Embedding) else weight.shape[-1]))
