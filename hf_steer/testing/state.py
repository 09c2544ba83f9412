"""What a model is, apart from what it computes: modules, configs, hooks, attributes and tensors, to be compared by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from hf_steer.ground.implementations import implementation_of, original_config
from hf_steer.patching.lifted import called_by

State = Mapping[str, Any]


def state_of(model: Any) -> State:
    """Name -> what is there. No tensor is copied: one that was written to is told by the count of writes that torch keeps."""
    return dict(_items(model))


def changes_between(before: State, after: State) -> list[str]:
    """Names of all that differs."""
    names = [*before, *(name for name in after if name not in before)]
    return [name for name in names if name not in before or name not in after or before[name] != after[name]]


def _items(model: Any) -> Iterator[tuple[str, Any]]:
    yield "state_dict keys", tuple(model.state_dict())
    yield "attention implementation", implementation_of(model.config)
    yield "values of the config", model.config.to_dict()
    for name, module in model.named_modules():
        own = vars(module)
        place = name or "the model"
        yield f"{place}: object", (id(module), type(module))
        yield f"{place}: config object", _config_of(own.get("config"))
        yield f"{place}: attributes", frozenset(own)
        kept = {key: value for key, value in own.items() if "hooks" in key and isinstance(value, dict)}
        hooks = {key: tuple(map(called_by, value.values())) for key, value in kept.items()}
        yield f"{place}: hooks", hooks
        yield f"{place}: training", module.training
    for name, parameter in model.named_parameters():
        yield f"{name}: tensor", (id(parameter), parameter.data_ptr(), parameter.requires_grad, _writes(parameter))
        yield f"{name}: gradient", id(parameter.grad)


def _config_of(config: Any) -> Any:
    """Which object it is; of one that a steered module has for its own, the one that it had, and the function that it names."""
    if not isinstance(config, PreTrainedConfig):
        return id(config)
    return id(original_config(config)), implementation_of(config)


def _writes(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
