"""transformers' flash attention looks its kernel up by the name in the module's config, which is ours in a steered module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class UnderOwnName:
    """An attention module as flash's function has to see it: with the config that it had before it was steered."""

    def __init__(self, module: Any) -> None:
        self.module, self.config = module, module.config.hf_steer_original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def flash_by_name(module: Any, *args: Any, flash: Callable[..., Any], **kwargs: Any) -> Any:
    """transformers' flash attention for a module whose config names our function."""
    return flash(UnderOwnName(module), *args, **kwargs)
