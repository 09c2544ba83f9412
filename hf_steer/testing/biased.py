"""An oracle for any architecture: the unpatched model, with `λ · s` added to the logits of its own attention, in floats.

It knows nothing of where hf_steer finds attention. It wraps what transformers' look-up of attention functions gives to all modules;
in models that look none up, every softmax. Which modules read the prompt is seen in a pass: as many queries and keys as it has
tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from hf_steer.ground.arguments import ARGUMENTS
from hf_steer.testing.report import CannotShow

Through = Literal["interface", "softmax"]


@dataclass
class AttentionCalls:
    """A block in which every call of attention is written down, and some are biased.

    Attributes:
        through: where calls are seen: transformers' attention interface, or the softmax.
        modules: whose calls are biased.
        bias: `λ · s`, `(rows, prompt tokens)`; None to look on alone.
        seen: module, queries and keys of each call.
    """

    through: Through = "interface"
    modules: Collection[Any] = ()
    bias: Tensor | None = None
    seen: list[tuple[Any, int, int]] = field(default_factory=list)

    def __enter__(self) -> AttentionCalls:
        self._block = ExitStack()
        for place, name, wrapped in _INSTEAD[self.through](self):
            self._block.enter_context(mock.patch.object(place, name, wrapped))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._block.close()

    def reading(self, tokens: int) -> list[Any]:
        """The modules of which a call had so many queries, and as many keys."""
        found = [module for module, queries, keys in self.seen if queries == keys == tokens]
        return list(dict.fromkeys(found))

    def added(self, module: Any, like: Tensor, queries: int, keys: int) -> Tensor | None:
        """Write a call down.

        Args:
            module: that attends.
            like: queries or logits, of `(rows * times, ...)`.
            queries: tokens.
            keys: tokens; those of the prompt come first.

        Returns:
            What its logits gain, `(rows * times, keys)`; None for nothing.

        Raises:
            CannotShow: there are fewer keys than the prompt has tokens.
        """
        self.seen.append((module, queries, keys))
        if self.bias is None or module not in self.modules:
            return None
        if keys < self.bias.shape[1]:
            raise CannotShow(f"{keys} keys cannot stand for a prompt of {self.bias.shape[1]} tokens")
        rows = self.bias.repeat_interleave(like.shape[0] // self.bias.shape[0], 0).to(like.dtype)
        return nn.functional.pad(rows, (0, keys - rows.shape[1]))


def _look_up(calls: AttentionCalls) -> Iterator[tuple[Any, str, Any]]:
    original = AttentionInterface.get_interface

    def attend(
        function: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        mask = kwargs.pop(ARGUMENTS["mask"][0], mask)
        added = calls.added(module, query, query.shape[2], key.shape[2])
        return function(module, query, key, value, mask if added is None else _with_bias(mask, added, query), *args, **kwargs)

    yield AttentionInterface, "get_interface", lambda *args, **kwargs: partial(attend, original(*args, **kwargs))


def _softmax(calls: AttentionCalls) -> Iterator[tuple[Any, str, Any]]:
    inside: list[Any] = []

    def wrapped(function: Callable[..., Tensor], logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if inside or logits.ndim < 3:  # some of these are made of others
            return function(logits, *args, **kwargs)
        inside.append(function)
        try:
            added = calls.added(_caller(sys._getframe(1)), logits, *logits.shape[-2:])
            between = [1] * (logits.ndim - 2)
            biased = logits if added is None else logits + added.view(logits.shape[0], *between, logits.shape[-1])
            return function(biased, *args, **kwargs)
        finally:
            inside.pop()

    for place in (torch, nn.functional, Tensor):
        original = place.softmax
        yield place, "softmax", lambda *args, original=original, **kwargs: wrapped(original, *args, **kwargs)


def _caller(frame: FrameType | None) -> Any:
    """The module whose code comes to the softmax."""
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, nn.Module) and not isinstance(found, nn.Softmax):
            return found
        frame = frame.f_back
    return None


def _with_bias(mask: Tensor | None, added: Tensor, query: Tensor) -> Tensor:
    bias = added[:, None, None].expand(-1, 1, query.shape[2], -1)
    if mask is None:
        return bias
    mask = mask[..., : added.shape[1]]
    return torch.where(mask, bias, torch.finfo(query.dtype).min) if mask.dtype == torch.bool else mask + bias


_INSTEAD: dict[str, Callable[[AttentionCalls], Iterator[tuple[Any, str, Any]]]] = {"interface": _look_up, "softmax": _softmax}
"""What is wrapped: place, name, and what stands there instead."""
