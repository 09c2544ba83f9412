"""Patch live Hugging Face models: turn the gaze of a reasoning decoder, align frozen encoders with it.

Importing this imports neither torch nor transformers: a name, or a module of ours, is fetched when it is first asked for.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AlignerConfig": "config",
    "AlignerError": "errors",
    "AttentionConfig": "config",
    "Backend": "registry",
    "ConfigError": "errors",
    "ContractError": "errors",
    "EncoderRow": "registry",
    "Family": "registry",
    "FileError": "errors",
    "Gate": "registry",
    "GateConfig": "config",
    "GroundError": "errors",
    "PatchError": "errors",
    "Router": "registry",
    "Saliency": "saliency",
    "SaliencyConfig": "config",
    "SaliencyError": "errors",
    "SaliencyProvider": "provider",
    "Source": "registry",
    "SteerConfig": "config",
    "SteerError": "errors",
    "SteerStatus": "patching",
    "compose": "compose",
    "disable_steering": "patching",
    "from_pretrained": "io",
    "get_steer_status": "patching",
    "load_heads": "analysis.heads",
    "load_steering": "io",
    "patch_model": "patching",
    "print_trainable_parameters": "patching",
    "read_saliency": "patching",
    "register_backend": "registry",
    "register_family": "registry",
    "register_gate": "registry",
    "register_router": "registry",
    "register_source": "registry",
    "save_steering": "io",
    "trace_steering": "patching",
    "unpatch_model": "patching",
    "use_saliency": "patching",
    "use_strength": "patching",
    "verify": "verify",
}
"""Public name -> the module that has it. Type checkers read `__init__.pyi`, which has a line for each."""

__all__ = sorted(_HOMES)


class _Package(ModuleType):
    """Keeps a public name what it is, whatever is imported when: importing `hf_steer.compose` would set that name to the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    module = f"{__name__}.{name}"
    if not name.startswith("_"):
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


sys.modules[__name__].__class__ = _Package
