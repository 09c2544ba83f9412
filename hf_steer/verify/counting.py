"""What a verification costs, by what it computes: forward passes, and the tokens in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_steer.ground.arguments import read_call
from hf_steer.ground.parts import Anatomy
from hf_steer.patching.edits import AddHook


class PassCounter(nn.Module):
    """Counts the calls of one module.

    Attributes:
        passes: how many.
        tokens: rows times tokens of all of them together; those of frames and pictures alone are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.tokens = 0

    def count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call."""
        self.passes += 1
        source = read_call(module, args, kwargs).source
        if source is not None:
            self.tokens += int(source.shape[0] * source.shape[1])


@contextmanager
def counted(anatomy: Anatomy) -> Iterator[PassCounter]:
    """Count the passes of a model inside the block: those of its decoder, or of its encoder where it has no other."""
    counter = PassCounter()
    with AddHook(anatomy.base if anatomy.decoder is None else anatomy.decoder, "before", counter.count):
        yield counter
