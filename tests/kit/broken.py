"""Models that a release of transformers may bring: a class of their own with one thing changed, or a method less."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from hf_steer import disable_steering, get_steer_status


def reclass(module: Any, **methods: Any) -> None:
    """Give one module a class of its own under the same name, which nothing that is kept by class has seen before."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})


def declared(kind: type, change: Any) -> Any:
    """A forward under another signature.

    Args:
        kind: whose forward runs underneath.
        change: from a parameter to the one that stands in its place, or None for none.
    """
    theirs = inspect.signature(inspect.unwrap(kind.forward)).parameters  # type: ignore[attr-defined]
    ours = {name: change(own) for name, own in theirs.items()}
    back = {new.name: name for name, new in ours.items() if new is not None}
    signature = inspect.Signature([own for own in ours.values() if own is not None])

    def forward(self, *args, **kwargs):
        signature.bind(self, *args, **kwargs)
        return kind.forward(self, *args, **{back.get(name, name): value for name, value in kwargs.items()})

    forward.__signature__ = signature
    return forward


def renamed(old: str, new: str, **changes: Any) -> Any:
    """For `declared`: one parameter under another name."""
    return lambda own: own.replace(name=new, **changes) if own.name == old else own


def state_of(model: Any) -> tuple[Any, ...]:
    """What a refused patch must leave as it is: keys, tensors, modules, classes, configs, hooks and attributes."""
    modules = [
        (name, module, type(module), id(vars(module).get("config")), len(module._forward_hooks), len(module._forward_pre_hooks),
         set(vars(module)))
        for name, module in model.named_modules()
    ]  # fmt: skip
    return modules, [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()], vars(model.config).keys()


def spoil(model: Any, change: Any) -> Any:
    """The same model, whose output goes wrong.

    Args:
        model: gets a class of its own.
        change: is called with the model, the arguments of each forward pass by name, and its output, which it may write to.
    """
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        output = kind.forward(self, *args, **kwargs)
        change(self, kwargs, output)
        return output

    reclass(model, forward=forward)
    return model


def spoil_where(model: Any, condition: Any) -> Any:
    """The same model, with other logits in the passes of a patched model that meet a condition on it and on their arguments."""

    def change(self, kwargs, output):
        if is_patched(self) and condition(self, kwargs):
            output.logits = 1.5 * output.logits

    return spoil(model, change)


def is_patched(model: Any) -> bool:
    return get_steer_status(model).patched


def is_steered(model: Any) -> bool:
    return get_steer_status(model).steers


def swallow(model: Any, errors: Any) -> Any:
    """The same model, which runs unsteered where it fails, and says nothing."""
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        try:
            return kind.forward(self, *args, **kwargs)
        except errors:
            with disable_steering(self):
                return kind.forward(self, *args, **{name: value for name, value in kwargs.items() if name != "hf_steer"})

    reclass(model, forward=forward)
    return model
