"""Reversible changes to a live model. Each is a context manager that puts back what was there before.

They are classes with plain attributes and not generators, so that a patched model can be copied: the copy's edits then
point to the copy's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import nn

from hf_steer.ground.implementations import with_implementation


class AddSubmodule:
    """Register `child` as `parent.<name>`."""

    def __init__(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        self.parent, self.name, self.child = parent, name, child

    def __enter__(self) -> None:
        self.parent.add_module(self.name, self.child)

    def __exit__(self, *_: object) -> None:
        delattr(self.parent, self.name)


class SetAttribute:
    """Set an attribute on one instance; undoing restores the instance's own value, or uncovers the class's."""

    def __init__(self, target: Any, name: str, value: Any) -> None:
        self.target, self.name, self.value = target, name, value

    def __enter__(self) -> None:
        self.had = self.name in vars(self.target)
        self.previous = vars(self.target).get(self.name)
        setattr(self.target, self.name, self.value)

    def __exit__(self, *_: object) -> None:
        if self.had:
            setattr(self.target, self.name, self.previous)
        else:
            delattr(self.target, self.name)


class SetAttentionFunction:
    """Give one attention module its own shallow config copy that names another attention function.

    Masks are built from the model's config, which stays as it is, and so do all other layers.
    """

    def __init__(self, module: Any, name: str, *, layer: int | None = None, sees: bool = False) -> None:
        self.module, self.name, self.layer, self.sees = module, name, layer, sees

    def __enter__(self) -> None:
        self.previous = self.module.config
        self.module.config = with_implementation(self.previous, self.name, sees=self.sees, layer=self.layer)

    def __exit__(self, *_: object) -> None:
        self.module.config = self.previous


class AddHook:
    """Add a hook that sees keyword arguments; `hook` is a bound method of a registered submodule, or a partial of one.

    `"finally"` is an `"after"` that also runs when the module raises.
    """

    def __init__(self, module: nn.Module, kind: Literal["before", "after", "finally"], hook: Callable[..., Any]) -> None:
        self.module, self.kind, self.hook = module, kind, hook

    def __enter__(self) -> None:
        if self.kind == "before":
            self.handle = self.module.register_forward_pre_hook(self.hook, prepend=True, with_kwargs=True)
        else:
            always = self.kind == "finally"
            self.handle = self.module.register_forward_hook(self.hook, prepend=True, with_kwargs=True, always_call=always)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


class AddLoadHook:
    """Add a hook that sees what `load_state_dict` could not match."""

    def __init__(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self.module, self.hook = module, hook

    def __enter__(self) -> None:
        self.handle = self.module.register_load_state_dict_post_hook(self.hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


class SetTrainable:
    """Say which parameters are trained, and afterwards what was said before."""

    def __init__(self, wanted: Iterable[tuple[nn.Parameter, bool]]) -> None:
        self.wanted = list(wanted)

    def __enter__(self) -> None:
        self.previous = [(parameter, parameter.requires_grad) for parameter, _ in self.wanted]
        for parameter, trained in self.wanted:
            parameter.requires_grad_(trained)

    def __exit__(self, *_: object) -> None:
        for parameter, trained in self.previous:
            parameter.requires_grad_(trained)
