"""The steering's own weights in memory: by name, gathered, checked, copied."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_steer.errors import FileError
from hf_steer.patching.planned import Plan
from hf_steer.patching.scopes import STEERING

_CHECKPOINT = re.compile(r"checkpoint-\d+")


def own_weights(steering: Any) -> dict[str, Tensor]:
    """Everything that training the steering changes: `aligners.0.router.weight`, `projector.linear.weight`, ..."""
    weights: dict[str, Tensor] = dict(steering.state_dict())
    for projector in steering.plan.projectors:
        weights |= {f"projector.{name}": value for name, value in projector.state_dict().items()}
    return weights


def gather_weights(steering: Any, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The same, whole and on the CPU.

    Args:
        steering: of the patched model.
        given: the root model's weights, gathered. Without them sharded weights are gathered here, which takes every process.
    """
    names = root_names(steering)
    return {name: _whole(name, value if given is None else given[names[name]]) for name, value in own_weights(steering).items()}


def gather_checkpoint(steering: Any, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """All that is trained, under the names that it has in the root model, where Trainer looks for them when it resumes.

    Args:
        steering: of the patched model.
        given: the root model's weights, gathered; None to take them from the model.
    """
    names = root_names(steering)
    own = {names[name]: value for name, value in gather_weights(steering, given).items()}
    adapters = adapter_parameters(steering.plan.anatomy.root)
    rest = {
        name: parameter
        for name, parameter in steering.plan.anatomy.root.named_parameters()
        if name not in own and (parameter.requires_grad or id(parameter) in adapters)
    }
    return own | {name: _whole(name, value if given is None else given[name]) for name, value in rest.items()}


def root_names(steering: Any) -> dict[str, str]:
    """Name of a weight here -> its name in the root model."""
    names = {name: f"{STEERING}.{name}" for name in steering.state_dict()}
    for prefix, projector in named_projectors(steering.plan):
        names |= {f"projector.{name}": f"{prefix}.{name}" for name in projector.state_dict()}
    return names


def trains_alone(steering: Any) -> bool:
    """Whether the steering has weights, and nothing else in the model is trained."""
    trained = {id(parameter) for module in (steering, *steering.plan.projectors) for parameter in module.parameters()}
    root = steering.plan.anatomy.root
    return bool(trained) and not any(p.requires_grad for p in root.parameters() if id(p) not in trained)


def adapter_parameters(root: nn.Module) -> set[int]:
    """Parameters that PEFT added to the base, where it has."""
    if "peft" not in sys.modules:
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in root.modules() if isinstance(module, BaseTunerLayer)]
    children = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    return {id(parameter) for child in children if isinstance(child, nn.Module) for parameter in child.parameters()}


def is_adapted(steering: Any) -> bool:
    """Whether the root model holds adapters by transformers' own `add_adapter`, so that saving it writes them and no base."""
    return bool(getattr(steering.plan.anatomy.root, "_hf_peft_config_loaded", False))


def is_checkpoint(steering: Any, directory: str | os.PathLike[str]) -> bool:
    """Whether a folder has Trainer's name for a checkpoint, and the base is where it came from: it is not trained."""
    named = _CHECKPOINT.fullmatch(os.path.basename(os.path.normpath(directory)))
    return bool(named) and (is_adapted(steering) or trains_alone(steering))


def check_shapes(steering: Any, given: Mapping[str, Tensor], prefix: str) -> None:
    """FileError for weights of another shape than the steering's, with what to do; torch alone would only name them."""
    own = steering.state_dict()
    names = [name for name in own if f"{prefix}{name}" in given and given[f"{prefix}{name}"].shape != own[name].shape]
    if names:
        raise FileError(
            f"{names[0]} has shape {tuple(given[prefix + names[0]].shape)} in this checkpoint, needed is "
            f"{tuple(own[names[0]].shape)}: it holds another steering. Patch with the steer_config.json beside the checkpoint."
        )


def check_loaded(steering: Any, incompatible: Any) -> None:
    """Judge what `load_state_dict` could not match: with all of the base missing it was a checkpoint of the steering.

    Raises:
        FileError: such a checkpoint that lacks a part of this steering, or holds another. It is no fresh start.
    """
    trained = tuple(f"{name}." for name in (STEERING, *(name for name, _ in named_projectors(steering.plan))))
    root, missing = steering.plan.anatomy.root, set(incompatible.missing_keys)
    adapters = adapter_parameters(root)
    added = {name for name, parameter in root.named_parameters() if id(parameter) in adapters}
    if not {name for name in root.state_dict() if not name.startswith(trained)} - added <= missing:
        return
    own = sorted(name for name in missing if name.startswith(trained))
    foreign = [name for name in incompatible.unexpected_keys if name.startswith(f"{STEERING}.")]
    if added - missing and len(own) == len(own_weights(steering)) and not foreign:
        return  # adapters and nothing of ours: no checkpoint of a patched model
    if own or foreign:
        raise FileError(
            f"this checkpoint holds another steering: {', '.join(own[:3]) or 'nothing'} missing, "
            f"{', '.join(foreign[:3]) or 'nothing'} unexpected. Patch with the steer_config.json beside the checkpoint."
        )
    incompatible.missing_keys[:] = sorted(added & missing)


def named_projectors(plan: Plan) -> list[tuple[str, Any]]:
    """The trained projectors with their paths from the root model."""
    names = {id(module): name for name, module in plan.anatomy.root.named_modules()}
    return [(names[id(projector)], projector) for projector in plan.projectors]


def check_fit(needed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: str | os.PathLike[str]) -> None:
    """FileError for names or shapes that do not fit; all of them are named."""
    faults = [f"{name} is missing" for name in needed if name not in shapes]
    faults += [f"{name[:80]} is not part of this steering" for name in shapes if name not in needed]
    faults += [
        f"{name} has shape {shapes[name]}, needed is {tuple(value.shape)}"
        for name, value in needed.items()
        if name in shapes and shapes[name] != tuple(value.shape)
    ]
    if faults:
        raise FileError(
            f"the steering weights in {os.fspath(source)} do not fit this model and configuration: {_some(faults)}. They were "
            "saved with another kind or size of aligner, or for another model; load them with the steer_config.json beside them."
        )


def check_values(weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """FileError for weights that no training leaves behind."""
    faults = [
        f"{name[:80]} holds {str(value.dtype).removeprefix('torch.')}, needed are real numbers"
        for name, value in weights.items()
        if not value.is_floating_point()
    ]
    faults += [
        f"{name[:80]} holds infinity or NaN"
        for name, value in weights.items()
        if value.is_floating_point() and not torch.isfinite(value.double() if value.element_size() < 2 else value).all()
    ]
    if faults:
        raise FileError(f"the steering weights in {os.fspath(source)} cannot be used: {_some(faults)}. Save them again.")


def load_weights(steering: Any, weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Copy weights into the steering, all or none.

    Raises:
        FileError: names or shapes that do not fit; all of them are named, and the model is as it was.
    """
    own = own_weights(steering)
    check_fit(own, {name: tuple(value.shape) for name, value in weights.items()}, source)
    away = [name for name, value in own.items() if value.is_meta]
    if away:
        raise FileError(
            f"{', '.join(away[:3])} cannot be loaded while accelerate has it offloaded. Load the steering first and offload then, "
            "or keep the projector in memory: device_map={..., 'model.multi_modal_projector': 'cpu'}."
        )
    with torch.no_grad():
        for name, value in own.items():
            if isinstance(value, DTensor):
                value.copy_(distribute_tensor(weights[name].to(value.device), value.device_mesh, value.placements))
            else:
                value.copy_(weights[name])


def _whole(name: str, value: Tensor) -> Tensor:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    if value.is_meta:
        raise FileError(f"{name} cannot be saved while accelerate has it offloaded; save before offloading.")
    return value.detach().cpu()


def _some(faults: list[str]) -> str:
    return "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")


def is_first() -> bool:
    """Whether this process is the one that writes."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
