"""Blocks of a caller's code in which something holds for one model: what is said, how hard, who listens.

Each block ends what it began and nothing else, in whatever order, thread or context blocks are closed: closing marks the block
itself, so a context that still lists it passes over it. A context variable's own token could be taken back in its context alone.
A block that a generator enters holds while that generator's code runs, in whatever thread it is pulled, and never in its caller.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import threading
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

_OWN = (contextlib.__file__, __file__)
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_NUMBERS = itertools.count()


@dataclass(eq=False)
class Entry:
    """One stay in a block.

    Attributes:
        steering: of the model; None once it is over, so that a context which still lists it keeps nothing alive.
        kind: what holds.
        value: what is held.
        frame: of the generator that entered it; None where it was no generator's code.
        number: in the order of all entries.
        thread: that entered it.
    """

    steering: object | None
    kind: str
    value: Any
    frame: FrameType | None
    number: int
    thread: int


class Block(contextlib.ContextDecorator):
    """A context manager, or decorator, in which `value` holds, in this thread or task, for the calls of one patched model.

    Args:
        steering: of the model.
        kind: what holds, such as `"saliency"`; the innermost of a kind counts.
        value: what is held.
        follows: whether a block that a generator enters holds while that generator runs, wherever it is pulled; else it is one of
            the context, as around a call that ends before the generator goes on.
    """

    def __init__(self, steering: object, kind: str, value: Any, *, follows: bool = True) -> None:
        self.steering, self.kind, self.value, self.follows = steering, kind, value, follows
        self.entries: list[Entry] = []

    def _recreate_cm(self) -> Block:
        """As a decorator: each call of the function is a block of its own."""
        return Block(self.steering, self.kind, self.value, follows=self.follows)

    def __enter__(self) -> Any:
        frame, number = _generator_that_asks() if self.follows else None, next(_NUMBERS)
        entry = Entry(self.steering, self.kind, self.value, frame, number, threading.get_ident())
        self.entries.append(entry)
        if frame is None:
            _STACK.set((*_STACK.get(), entry))
        OPEN[number] = weakref.ref(entry)
        return self.value

    def __exit__(self, *_: object) -> None:
        entry = self.entries.pop()
        entry.steering = entry.value = entry.frame = None
        OPEN.pop(entry.number, None)
        _STACK.set(tuple(own for own in _STACK.get() if own.steering is not None))


_STACK: ContextVar[tuple[Entry, ...]] = ContextVar("hf_steer_blocks", default=())
OPEN: dict[int, weakref.ref[Entry]] = {}
"""All stays of this process that are not over, in the order in which they began."""


def entries_around(steering: object) -> list[Entry]:
    """The stays in blocks of a model that this code is in, the outermost first."""
    return [entry for entry in _around() if entry.steering is steering]


def held_elsewhere(steering: object, kind: str) -> bool:
    """Whether another thread is inside such a block now."""
    own = threading.get_ident()
    return any(entry.steering is steering and entry.kind == kind and entry.thread != own for entry in _all_open())


def steerings_with(*kinds: str) -> list[Any]:
    """The steerings of which this code is in a block of one of these kinds."""
    return [entry.steering for entry in _around() if entry.kind in kinds and entry.steering is not None]


def _around() -> tuple[Entry, ...]:
    """The blocks that the code that runs now is in, the outermost first."""
    stack = _STACK.get()
    if torch.compiler.is_compiling() or not OPEN:
        return stack
    generators = [entry for entry in _all_open() if entry.frame is not None and is_running(entry.frame)]
    return tuple(sorted((*stack, *generators), key=lambda entry: entry.number)) if generators else stack


def _all_open() -> list[Entry]:
    found = (reference() for reference in list(OPEN.values()))
    return [entry for entry in found if entry is not None and entry.steering is not None]


def _generator_that_asks() -> FrameType | None:
    """The generator whose code enters a block; None where it is no generator's. One that `contextlib` runs is its caller's."""
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


def is_running(wanted: FrameType) -> bool:
    """Whether a frame goes on below the code that asks, in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted
