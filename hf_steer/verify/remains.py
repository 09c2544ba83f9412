"""What of a patch is still there in a model that should have none."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from hf_steer.ground.implementations import implementation_of, is_ours
from hf_steer.patching.scopes import STEERING


def remains_of(root: Any) -> list[str]:
    """In words, with the places; empty where nothing is left."""
    left = [f"submodule {STEERING}"] if STEERING in root._modules else []
    left += [f"attribute {name}" for name, value in vars(root).items() if _is_patching(value)]
    for name, module in root.named_modules():
        own, place = vars(module), name or "the model"
        config = own.get("config")
        if isinstance(config, PreTrainedConfig) and is_ours(implementation_of(config)):
            left.append(f"attention function of {place}")
        hooks = (value for key, value in own.items() if "hooks" in key and isinstance(value, dict))
        left += [f"hook of {place}" for kept in hooks for hook in kept.values() if _is_patching(hook)]
    return left


def _is_patching(value: Any) -> bool:
    """Whether something is a function or method of the room that patches."""
    inner = getattr(value, "func", value)
    return callable(inner) and str(getattr(inner, "__module__", "")).startswith("hf_steer.patching")
