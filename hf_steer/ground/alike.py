"""What was found in one model, kept for those that are alike: nothing that looks at structure can tell them apart.

What is kept names modules by their paths, so that no model is kept alive by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

from torch import nn

from hf_steer.ground.parts import Encoder


def shape_of(model: Any, names: Mapping[nn.Module, str]) -> Hashable:
    """Class, configuration and parts of a model: equal for those that are alike, whatever their weights and device.

    None where a part does by itself what its class does otherwise (a `forward` that was set on it): such a model is like no other.
    """
    if any(_is_own(module) for module in names):
        return None
    return repr(model.config.to_dict()), tuple([(name, type(module), *_sizes(module)) for module, name in names.items()])


def exchanged(encoder: Encoder, by: Mapping[Any, Any]) -> Encoder:
    """The same with another thing in place of each module: its path to be kept, or a module of a model that is alike."""
    return dataclasses.replace(
        encoder,
        tower=by[encoder.tower],
        layers=tuple(dataclasses.replace(site, module=by[site.module]) for site in encoder.layers),
        outlet=by[encoder.outlet],
        projector=None if encoder.projector is None else by[encoder.projector],
        projectors=tuple(by[own] for own in encoder.projectors),
    )


def _is_own(module: nn.Module) -> bool:
    """Whether a method of its class was replaced on the module itself."""
    kind = type(module)
    return any(callable(own) and callable(getattr(kind, name, None)) for name, own in vars(module).items())


def _sizes(module: nn.Module) -> list[Any]:
    return [(name, None if own is None else own.shape) for name, own in module._parameters.items()] if module._parameters else []
