"""Blocks of a caller's code in which something holds for one model: what is said, how hard, who listens.

Each block ends what it began and nothing else, in whatever order, thread or context blocks are closed: closing marks the block
itself, so a context that still lists it passes over it. A context variable's own token could be taken back in its context alone.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch

_OWN = (contextlib.__file__, __file__)
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Block(contextlib.ContextDecorator):
    """A context manager, or decorator, in which `value` holds, in this thread or task, for the calls of one patched model.

    Inside a generator it holds while the generator's own code runs: whoever iterates over it is not steered by it. A generator
    that `contextlib.contextmanager` runs is a block of its caller.

    Args:
        steering: of the model.
        kind: what holds, such as `"saliency"`; the innermost of a kind counts.
        value: handed back by `held`.
    """

    def __init__(self, steering: object, kind: str, value: Any) -> None:
        self.steering, self.kind, self.value = steering, kind, value
        self.open = False
        self.frame: FrameType | None = None

    def _recreate_cm(self) -> Block:
        """As a decorator: each call of the function is a block of its own."""
        return Block(self.steering, self.kind, self.value)

    def __enter__(self) -> Any:
        self.open, self.frame = True, _generator_that_asks()
        _STACK.set((*_STACK.get(), self))
        _OPEN.add(self)
        return self.value

    def __exit__(self, *_: object) -> None:
        self.open, self.frame = False, None  # and nothing of the caller's is kept alive
        _OPEN.discard(self)
        _STACK.set(tuple(block for block in _STACK.get() if block.open))

    def holds(self) -> bool:
        """Whether the code that runs now is inside it."""
        return self.open and (self.frame is None or torch.compiler.is_compiling() or _is_running(self.frame))


_STACK: ContextVar[tuple[Block, ...]] = ContextVar("hf_steer_blocks", default=())
_OPEN: weakref.WeakSet[Block] = weakref.WeakSet()


def held(steering: object, kind: str) -> Any | None:
    """The value of the innermost block of a kind that this code is in; None outside of all."""
    for block in reversed(_STACK.get()):
        if block.steering is steering and block.kind == kind and block.holds():
            return block.value
    return None


def held_elsewhere(steering: object, kind: str) -> bool:
    """Whether code that is not on this thread's way is inside such a block now."""
    return any(block.steering is steering and block.kind == kind and block.open for block in tuple(_OPEN))


def steerings_with(*kinds: str) -> list[Any]:
    """The steerings of which this code is in a block of one of these kinds."""
    return [block.steering for block in _STACK.get() if block.kind in kinds and block.holds()]


def _generator_that_asks() -> FrameType | None:
    """The generator whose code enters a block; None where it is no generator's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if _is_ours(frame):
            frame = frame.f_back
        elif not frame.f_code.co_flags & _GENERATOR:
            return None
        elif frame.f_back is not None and frame.f_back.f_code.co_filename == contextlib.__file__:
            frame = frame.f_back  # a context manager of the caller's own
        else:
            return frame
    return None


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename in _OWN or str(frame.f_globals.get("__name__", "")).startswith("hf_steer.patching.")


def _is_running(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted
