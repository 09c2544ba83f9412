"""transformers' flash attention looks its kernel up by the name in the module's config, which is ours in a steered module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any


class UnderOwnName:
    """An attention module as flash's function has to see it: that looks its kernel up by the name in the module's config."""

    def __init__(self, module: Any, implementation: str) -> None:
        self.module = module
        self.config = copy.copy(module.config)
        self.config._attn_implementation_internal = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def flash_by_name(module: Any, *args: Any, flash: Callable[..., Any], implementation: str, **kwargs: Any) -> Any:
    """transformers' flash attention for a module whose config names our function."""
    return flash(UnderOwnName(module, implementation), *args, **kwargs)
