"""The layers of an encoder, and the size of what they hand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_steer.ground.flow import follow
from hf_steer.ground.widths import Width, width_into


@dataclass(frozen=True)
class Stack:
    """Layers whose output can be steered: their list's path in the encoder, those that matter, and the size of their features."""

    path: str = ""
    layers: tuple[nn.Module, ...] = ()
    size: int = 0


def stack_in(tower: Any, states: Sequence[int] = ()) -> Stack:
    """The longest list of layers most of which are of one class, those that checkpoint before others, the outermost first.

    Args:
        tower: the encoder.
        states: hidden states that are read, as the configuration says; empty for the last. What comes after them does nothing.
    """
    lists = [
        (isinstance(own[0], GradientCheckpointingLayer), -path.count("."), len(own), path, own)
        for path, own in tower.named_modules()
        if isinstance(own, nn.ModuleList) and len(own) and 2 * len(_commonest(own)) >= len(own)
    ]
    for _, _, depth, path, layers in sorted(lists, key=lambda row: row[:3], reverse=True):
        if _size(width_into(layers[-1])) == 0:
            continue
        sizes = _sizes(tower, path, layers)
        read = max((state if state >= 0 else depth + 1 + state for state in states), default=depth)
        among = set(_commonest(layers))
        chosen = [layer for layer, own in list(zip(layers, sizes, strict=True))[:read] if own == sizes[-1] and layer in among]
        return Stack(path, tuple(chosen), sizes[-1])
    return Stack()


def _commonest(layers: nn.ModuleList) -> list[nn.Module]:
    """Layers of the class that most of them have; of two, the last one's."""
    kinds = [type(layer) for layer in reversed(list(layers))]
    most = max(dict.fromkeys(kinds), key=kinds.count)
    return [layer for layer in layers if type(layer) is most]


def _sizes(tower: Any, path: str, layers: nn.ModuleList) -> list[int]:
    """What each layer hands on: what the next one reads, and for the last what comes after the list, where that is known."""
    shapes = [tuple(parameter.shape for parameter in layer.parameters()) for layer in layers]
    kinds = {own: _size(width_into(layers[shapes.index(own)])) for own in dict.fromkeys(shapes)}  # most are alike
    into = [kinds[own] for own in shapes]
    if len(into) > 1 and len(set(into)) == 1:  # each adds to what it reads
        return into
    where, _, name = path.rpartition(".")
    owner = tower.get_submodule(where)
    after: list[int] = []
    for call in follow(owner, "forward").calls:
        read = call.reads(name)
        if call.part != name and read is not None and not read[1].reshaped:
            after.append(_size(width_into(owner.get_submodule(call.part), read[0])))
    after = [own for own in after if own]
    return [*into[1:], into[-1] if into[-1] in after or not after else after[-1]]


def _size(width: Width | None) -> int:
    return width.size if width is not None and width.last and not width.reshaped else 0
