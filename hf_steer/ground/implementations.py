"""Attention implementations by name: which one a model runs, the function behind it, and one module's own copy of its config."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LOOKUP = "ALL_ATTENTION_FUNCTIONS"
"""The table of attention functions, by the name that modules look them up under."""
_THEIR_BASE = "transformers.modeling_utils"
FLASH = ("flash_attention_2", "flash_attention_3")
IMPLEMENTATION = "_attn_implementation"
"""Where the config of a (sub-)model, or of one module, says which implementation it runs; None for eager."""
_NAME = "_attn_implementation_internal"
ORIGINAL = "hf_steer_original"
"""Where a steered module's config keeps the one that it is a copy of."""
_SEES = "hf_steer_sees"
LAYER = "hf_steer_layer"
"""Where a steered module's config says the number that we know it by."""
CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods of a model that run its passes in a thread of their own, on paged caches."""
_BATCHING_ENDS = ("destroy_cached_continuous_batching_manager",)
SWITCH = "model.set_attn_implementation"
"""What users call to change the implementation."""


def implementation_of(config: Any) -> str:
    """The attention implementation that a (sub-)model, or one steered module, runs."""
    return getattr(config, IMPLEMENTATION) or "eager"


def use_implementation(model: Any, name: str) -> None:
    """Let all of a model run another implementation, as users do."""
    model.set_attn_implementation(name)


def with_implementation(config: Any, name: str, *, sees: bool = False, layer: int | None = None) -> Any:
    """A shallow copy of a config that names another attention function. Masks are built from the model's own, which stays.

    Args:
        config: of one module.
        name: of the function.
        sees: whether the layer is steered by what the model itself sees, even when nobody says anything.
        layer: the number that we know it by.
    """
    changed = copy.copy(config)
    setattr(changed, ORIGINAL, original_config(config))
    setattr(changed, _SEES, sees)
    setattr(changed, LAYER, numbered_layer(config) if layer is None else layer)
    setattr(changed, _NAME, name)  # the property's setter would reach into shared sub-configs
    return changed


def rename_function(module: Any, name: str) -> None:
    """Let a steered module's own copy of its config name another attention function; a config that is not ours is left alone."""
    if ORIGINAL in vars(module.config):
        setattr(module.config, _NAME, name)


def original_config(config: Any) -> Any:
    """The config that a steered module had."""
    return vars(config).get(ORIGINAL, config)


def unknown_batching(kind: type) -> tuple[str, ...]:
    """Public methods of a model class that begin continuous batching, by their names, and that we do not know."""
    public = (name for name in dir(kind) if not name.startswith("_") and name not in CONTINUOUS_BATCHING + _BATCHING_ENDS)
    return tuple(name for name in public if "continuous" in name or name.startswith("generate_batch"))


def sees_by_itself(config: Any) -> bool:
    """Whether a steered module's config says that the model's own eyes steer it."""
    return bool(vars(config).get(_SEES))


def numbered_layer(config: Any) -> Any:
    """The number that a steered module's config says it is known by; None for others."""
    return getattr(config, LAYER, None)


def register_function(name: str, function: Callable[..., Any], *, masked_as: str | None = None) -> None:
    """Make an attention function known under a name of ours; a registry entry changes no model.

    Args:
        name: of ours.
        function: as modules call it; see `attention_call.called_by_name`.
        masked_as: the implementation whose masks a whole model makes for it; None where only single modules run it.
    """
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    if masked_as is not None:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masked_as])


PREFIX = "hf_steer_"
"""Of the names of our attention functions."""


def is_ours(name: str) -> bool:
    """Whether an implementation's name is that of a function of hf_steer."""
    return name.startswith(PREFIX)


def function_of(implementation: str, kind: type) -> Callable[..., Any]:
    """The function that attention modules of a class call under an implementation's name.

    Raises:
        AttributeError: none of that name in the file of the class.
        KeyError: none of that name in transformers.
    """
    if implementation == "eager":  # lies in the model's own file
        return eager_of(kind)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[implementation]
    return partial(_flash_by_name, flash=function) if implementation in FLASH else function


@cache
def looking_up(kind: type) -> tuple[Any, ...]:
    """Methods of a class of modules that look an attention function up, where another can be put in its place."""
    classes = [own for own in kind.__mro__ if issubclass(own, nn.Module) and own is not nn.Module and own.__module__ != _THEIR_BASE]
    methods = [inspect.unwrap(method) for own in classes for method in vars(own).values() if inspect.isfunction(method)]
    return tuple(method for method in methods if LOOKUP in method.__code__.co_names)


@cache
def eager_of(kind: type) -> Callable[..., Any]:
    """The function that a class of modules falls back to: the one that its code names, or the one of its file.

    Raises:
        AttributeError: there is none.
    """
    for method in looking_up(kind):
        for name in method.__code__.co_names:
            if name.endswith("attention_forward") and callable(method.__globals__.get(name)):
                return method.__globals__[name]  # type: ignore[no-any-return]
    return importlib.import_module(kind.__module__).eager_attention_forward  # type: ignore[no-any-return]


def is_their_own(function: Callable[..., Any]) -> bool:
    """Whether a function is one that transformers brings, and not a wrapper that somebody put in its place."""
    inner = function.keywords.get("flash", function) if isinstance(function, partial) else function
    return str(getattr(inner, "__module__", "")).partition(".")[0] == "transformers"


class _UnderOwnName:
    """An attention module as flash's function has to see it: it looks its kernel up by the name in the module's config."""

    def __init__(self, module: Any) -> None:
        self.module, self.config = module, original_config(module.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _flash_by_name(module: Any, *args: Any, flash: Callable[..., Any], **kwargs: Any) -> Any:
    return flash(_UnderOwnName(module), *args, **kwargs)
