"""The bias added where a module takes its softmax, whatever its mask is: for attention that calls no function to be exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_steer.patching.edits import AddHook
from hf_steer.testing.report import CannotShow

_SOFTMAXES = frozenset({torch.softmax, F.softmax, Tensor.softmax})


class Softened(TorchFunctionMode):
    """While it is open, softmaxes over a prompt's tokens get a bias.

    Args:
        bias: `(batch, heads, 1, keys)`.
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias, self.count = bias, 0

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _SOFTMAXES and args:
            self.count += 1
            args = (args[0] + self._over(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))

    def _over(self, logits: Tensor) -> Tensor:
        """Of all heads in one dimension, or with streams before the heads, whose own keys come after the prompt's."""
        bias = F.pad(self.bias, (0, logits.shape[-1] - self.bias.shape[-1])).to(logits)
        if logits.ndim == 3:
            return bias.expand(-1, -1, logits.shape[1], -1).flatten(0, 1)
        return bias[:, None] if logits.ndim == 5 else bias


class SoftenedLayer:
    """An attention module whose softmax gets a bias, while it is open as a context.

    Args:
        module: of the layer.
        bias: `(batch, heads, 1, keys)`.
    """

    def __init__(self, module: nn.Module, bias: Tensor) -> None:
        self.mode = Softened(bias)
        self.hooks = AddHook(module, "before", self._begin), AddHook(module, "finally", self._end)

    def __enter__(self) -> None:
        for hook in self.hooks:
            hook.__enter__()

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.__exit__()
        if not self.mode.count:
            raise CannotShow("an attention module of this model takes no softmax that a bias could be added to")

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mode.__enter__()

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.mode.__exit__(None, None, None)
