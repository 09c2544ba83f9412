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
from collections.abc import Mapping
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
            STACK.set((*STACK.get(), entry))
        else:
            PULLED[number] = weakref.ref(entry)
        _OPEN[number] = weakref.ref(entry)
        return self.value

    def __exit__(self, *_: object) -> None:
        entry = self.entries.pop()
        entry.steering = entry.value = entry.frame = None
        _OPEN.pop(entry.number, None)
        PULLED.pop(entry.number, None)
        STACK.set(tuple(own for own in STACK.get() if own.steering is not None))


STACK: ContextVar[tuple[Entry, ...]] = ContextVar("hf_steer_blocks", default=())
"""The stays in blocks, of any model, that this context is in, the outermost first; those that are over have no steering."""
PULLED: dict[int, weakref.ref[Entry]] = {}
"""The stays of this process that hold while a generator's code runs, in the order in which they began."""
_OPEN: dict[int, weakref.ref[Entry]] = {}
"""All stays of this process that are not over."""


def entries_around() -> tuple[Entry, ...]:
    """The stays in blocks, of any model, that the code that runs now is in, the outermost first: of its context, which is all
    of them while `PULLED` is empty, and of generators."""
    stack = STACK.get()
    if torch.compiler.is_compiling() or not PULLED:
        return stack
    generators = [entry for entry in _there(PULLED) if entry.frame is not None and is_running(entry.frame)]
    return tuple(sorted((*stack, *generators), key=lambda entry: entry.number)) if generators else stack


def held_elsewhere(steering: object, kind: str) -> bool:
    """Whether another thread is inside such a block now."""
    own = threading.get_ident()
    return any(entry.steering is steering and entry.kind == kind and entry.thread != own for entry in _there(_OPEN))


def steerings_with(*kinds: str) -> list[Any]:
    """The steerings of which this code is in a block of one of these kinds."""
    return [entry.steering for entry in entries_around() if entry.kind in kinds and entry.steering is not None]


def _there(entries: Mapping[int, weakref.ref[Entry]]) -> list[Entry]:
    found = (reference() for reference in list(entries.values()))
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
