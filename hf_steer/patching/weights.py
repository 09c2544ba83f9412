"""The steering's own weights: in memory by name, on disk as one safetensors file beside the base model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_steer.errors import FileError
from hf_steer.files import write_whole
from hf_steer.patching.context import STEERING
from hf_steer.values import Plan

WEIGHTS_NAME = "hf_steer/steer_model.safetensors"
"""In a folder of its own: some servers load every safetensors file that lies beside a model."""
CHECKPOINT_WEIGHTS_NAME = "model.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def own_weights(steering: Any) -> dict[str, Tensor]:
    """Everything that training the steering changes: `aligners.0.router.weight`, `projector.linear.weight`, ..."""
    weights: dict[str, Tensor] = dict(steering.state_dict())
    for projector in steering.plan.projectors:
        weights |= {f"projector.{name}": value for name, value in projector.state_dict().items()}
    return weights


def write_weights(steering: Any, directory: str | os.PathLike[str], given: Mapping[str, Tensor] | None = None) -> None:
    """Write `hf_steer/steer_model.safetensors`, whole or not at all; nothing when the steering has no weights.

    Args:
        steering: of the patched model.
        directory: where to.
        given: the root model's weights, gathered. Without them sharded weights are gathered here, which takes every process;
            the first one writes.
    """
    names = _root_names(steering)
    weights = {name: _whole(name, value if given is None else given[names[name]]) for name, value in own_weights(steering).items()}
    if weights and _is_first():
        _write(Path(directory) / WEIGHTS_NAME, weights)


def write_checkpoint(steering: Any, directory: str | os.PathLike[str], given: Mapping[str, Tensor] | None) -> None:
    """Write the same weights under the names that they have in the root model, where Trainer looks for them.

    Args:
        steering: of the patched model.
        directory: Trainer's `checkpoint-<step>`.
        given: the root model's weights, gathered; None to take them from the model.
    """
    names = _root_names(steering)
    weights = {
        names[name]: _whole(name, value if given is None else given[names[name]]) for name, value in own_weights(steering).items()
    }
    if _is_first():
        _write(Path(directory) / CHECKPOINT_WEIGHTS_NAME, weights)


def _root_names(steering: Any) -> dict[str, str]:
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


def is_checkpoint(steering: Any, directory: str | os.PathLike[str]) -> bool:
    """Whether a folder has Trainer's name for a checkpoint, and all that was trained is the steering's."""
    return bool(_CHECKPOINT.fullmatch(os.path.basename(os.path.normpath(directory)))) and trains_alone(steering)


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
    missing = set(incompatible.missing_keys)
    if not {name for name in steering.plan.anatomy.root.state_dict() if not name.startswith(trained)} <= missing:
        return
    own = sorted(name for name in missing if name.startswith(trained))
    foreign = [name for name in incompatible.unexpected_keys if name.startswith(f"{STEERING}.")]
    if own or foreign:
        raise FileError(
            f"this checkpoint holds another steering: {', '.join(own[:3]) or 'nothing'} missing, "
            f"{', '.join(foreign[:3]) or 'nothing'} unexpected. Patch with the steer_config.json beside the checkpoint."
        )
    incompatible.missing_keys.clear()


def named_projectors(plan: Plan) -> list[tuple[str, Any]]:
    """The trained projectors with their paths from the root model."""
    names = {id(module): name for name, module in plan.anatomy.root.named_modules()}
    return [(names[id(projector)], projector) for projector in plan.projectors]


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of one file; FileError when it cannot be read."""
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise FileError(f"{os.fspath(path)} cannot be read ({error}); it is truncated or foreign. Save it again.") from error


def load_weights(steering: Any, weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Copy weights into the steering, all or none.

    Raises:
        FileError: names or shapes that do not fit; all of them are named, and the model is as it was.
    """
    own = own_weights(steering)
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is not part of this steering" for name in weights if name not in own]
    faults += [
        f"{name} has shape {tuple(weights[name].shape)}, needed is {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if faults:
        shown = "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
        raise FileError(
            f"the steering weights in {os.fspath(source)} do not fit this model and configuration: {shown}. They were saved with "
            "another kind or size of aligner, or for another model; load them with the steer_config.json beside them."
        )
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


def _write(path: Path, weights: Mapping[str, Tensor]) -> None:
    # no further metadata: the file's hash would change from run to run
    content = safetensors.torch.save({name: value.contiguous() for name, value in weights.items()}, {"format": "pt"})
    write_whole(path, content)


def _whole(name: str, value: Tensor) -> Tensor:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    if value.is_meta:
        raise FileError(f"{name} cannot be saved while accelerate has it offloaded; save before offloading.")
    return value.detach().cpu()


def _is_first() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
