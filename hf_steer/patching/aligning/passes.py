"""What the aligners' hooks of one forward pass tell each other, and who is listening to their routing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_steer.aligners import Routing
from hf_steer.patching.blocks import Block, held
from hf_steer.patching.scopes import steering_of


@dataclass
class Listener:
    """Sums of the routing statistics of the passes since it was last read.

    Attributes:
        sums: name such as `"image.output/experts/usage"` -> sum over passes.
        passes: how often each name was heard.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)

    def hear(self, place: str, routing: Routing, mask: Tensor | None) -> None:
        """Add one pass, without asking the device for a number."""
        for name, read in (("usage", routing.usage), ("load", routing.load), ("entropy", routing.entropy)):
            for router, value in read(mask).items():
                key = f"{place}/{router}/{name}"
                self.sums[key] = self.sums.get(key, 0) + value.detach()
                self.passes[key] = self.passes.get(key, 0) + 1

    def read(self) -> dict[str, list[float] | float]:
        """Means since the last reading: usage and load per expert, entropy in nats; empty when nothing was heard."""
        means: dict[str, list[float] | float] = {key: (value / self.passes[key]).tolist() for key, value in self.sums.items()}
        self.sums, self.passes = {}, {}
        return means


@dataclass
class Balance:
    """The weighted load-balancing losses of passes without labels.

    Attributes:
        terms: one per router and pass, with its gradient.
    """

    terms: list[Tensor] = field(default_factory=list)

    def loss(self) -> Tensor:
        """Their sum since it was last asked for, to be added to a loss of one's own; 0 where there were none."""
        terms, self.terms[:] = list(self.terms), []
        device = terms[0].device if terms else None
        return torch.stack([term.float().to(device) for term in terms]).sum() if terms else torch.zeros(())


@dataclass
class Pass:
    """One forward pass of a model with aligners.

    Attributes:
        ids: `(batch, tokens)`; None without text.
        real: `(batch, tokens)`, 0 for padding; None when all are real.
        labels: `(batch, tokens)`; the text from the first label on is the answer and not the prompt.
        perceives: whether pictures or sounds come with this pass.
        frames: which inputs or frames of the encoder are real, `(rows, inputs or frames)`.
        balances: weighted load-balancing losses so far; None when no loss is wanted.
        trains: whether this is a training step with labels.
        by: the model whose call it is.
        token: to take this pass back.
    """

    ids: Tensor | None
    real: Tensor | None
    labels: Tensor | None
    perceives: bool
    frames: Tensor | None
    balances: list[Tensor] | None
    trains: bool
    by: Any
    token: Token[Mapping[int, Pass]] | None = None

    def mask_for(self, features: Tensor) -> Tensor | None:
        """Which of the encoder's frames `(rows, frames, features)` are real; None when nothing says so.

        A convolution of stride two makes frame t out of input 2t; a mean over two frames after it needs both.
        """
        if self.frames is None or features.ndim != 3 or self.frames.shape[0] != features.shape[0]:
            return None
        stride = self.frames.shape[1] // max(features.shape[1], 1)
        if stride < 1:
            return None
        mask = self.frames[:, max(0, stride - 2) :: stride][:, : features.shape[1]]
        return mask.bool() if mask.shape == features.shape[:2] else None


_PASSES: ContextVar[Mapping[int, Pass]] = ContextVar("hf_steer_passes", default={})  # noqa: B039 - never mutated
ROUTING, PROMPT, BALANCE = "routing", "prompt", "balance"
"""Kinds of blocks: who listens to the routing, the whole prompt of a `generate`, who collects the load-balancing losses."""


def begin_pass(aligners: Any, current: Pass) -> None:
    """Make a pass the current one of this thread; while compiling, which cannot trace context variables, of the module."""
    if torch.compiler.is_compiling():
        aligners.compiled_pass = current
    else:
        current.token = _PASSES.set({**_PASSES.get(), id(aligners): current})


def current_pass(aligners: Any) -> Pass | None:
    """The pass that this thread is in."""
    if torch.compiler.is_compiling():
        return aligners.compiled_pass  # type: ignore[no-any-return]
    return _PASSES.get().get(id(aligners))


def forget_pass(aligners: Any) -> None:
    """Drop a pass that was interrupted: hooks that always run do not run on KeyboardInterrupt."""
    if torch.compiler.is_compiling():
        aligners.compiled_pass = None
    elif id(aligners) in _PASSES.get():
        _PASSES.set({key: value for key, value in _PASSES.get().items() if key != id(aligners)})


def end_pass(aligners: Any, current: Pass) -> None:
    """Take a pass back."""
    if torch.compiler.is_compiling():
        aligners.compiled_pass = None
    elif current.token is not None:
        _PASSES.reset(current.token)


def listener_of(aligners: Any) -> Listener | None:
    """Who listens in this thread; nobody while compiling."""
    return None if torch.compiler.is_compiling() else held(aligners, ROUTING)


def balances_of(aligners: Any) -> list[Tensor] | None:
    """Where this thread collects the load-balancing losses itself; None where they join the model's loss."""
    balance: Balance | None = None if torch.compiler.is_compiling() else held(aligners, BALANCE)
    return None if balance is None else balance.terms


def prompt_of(aligners: Any) -> tuple[Tensor, Tensor | None] | None:
    """The whole prompt of the `generate` that this thread is in, and its mask."""
    return None if torch.compiler.is_compiling() else held(aligners, PROMPT)


def whole_prompt(aligners: Any, ids: Tensor, mask: Tensor | None) -> AbstractContextManager[Any]:
    """Hold the prompt of one `generate`, whose first passes may see pieces of it."""
    return Block(aligners, PROMPT, (ids, mask))


def record_routing(model: Any) -> AbstractContextManager[Listener]:
    """Listen to the routing of this model's aligners inside the block, in this thread.

    Args:
        model: a patched model, wrapped or not.

    Returns:
        A block that gives a `Listener`; its `read()` gives the means since the last reading.

    Raises:
        PatchError: the model is not patched.
    """
    return Block(steering_of(model).aligners, ROUTING, Listener())
