"""What holds for a stretch of the caller's code, for one patched model: what is said, how hard, whether at all, who listens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.errors import PatchError, SaliencyError
from hf_steer.patching.blocks import PULLED, STACK, Block, entries_around
from hf_steer.patching.gaze.ledger import Generation
from hf_steer.patching.planned import Strengths
from hf_steer.saliency import Saliency

STEERING = "hf_steer"
"""Name of the submodule that a patched model carries, and of the keyword argument that rides through a forward pass."""
STATEMENT = "saliency"
"""The keyword argument of `generate` and of the model itself that says where to look in that one call."""
SAID, OFF, STRENGTHS, CALL, LISTENER, SOURCE, STRETCH = "saliency", "off", "strengths", "call", "listeners", "source", "stretch"
"""What a block may hold: fields of `Scope`."""


class Enough(Exception):
    """Raised inside a pass whose rest need not run: what was wanted has been read. It never leaves the package."""


class Listener:
    """Somebody who is told what happens in the passes of a stretch of code. `watching/` and `aligning/` have those that we know.

    Attributes:
        follows_steps: whether it wants to know when each query is steered, so that this is worked out for it.
        follows_routing: whether it wants to know what the aligners' routers decide.
        losses: where it takes the load-balancing losses of passes whose labels go another way; None where it takes none.
    """

    follows_steps = False
    follows_routing = False
    losses: list[Tensor] | None = None

    def scored(self, current: Any) -> None:
        """A prompt has its scores, raw and normalised."""

    def generated(self, current: Any, logits: Tensor, strengths: Strengths) -> None:
        """The logits of a pass are known."""

    def routed(self, place: str, routing: Any, mask: Tensor | None) -> None:
        """An aligner has sent tokens to its experts."""


@dataclass(eq=False)
class Source:
    """What a `generate` whose passes begin by themselves is called with: words, sounds or pictures for an encoder.

    Attributes:
        rows: how many.
        seconds: how long sounds are, padding included; 0 for anything else.
        prompt: what its first pass has brought; None before that, or where embeddings came.
        prompt_end: key position after that.
    """

    rows: int
    seconds: float = 0.0
    prompt: Tensor | None = None
    prompt_end: int | None = None


@dataclass(frozen=True)
class Stretch:
    """What is being decoded of long sounds.

    Attributes:
        rows: of the batch, as the caller counts them; one for each sound that goes on.
        starts_seconds: where each of them is.
        whole_seconds: how long they are.
    """

    rows: tuple[int, ...]
    starts_seconds: tuple[float, ...]
    whole_seconds: float


@dataclass(frozen=True)
class Scope:
    """What holds for the code that runs now, for one patched model.

    Attributes:
        off: steering is off.
        saliency: what the user says.
        strengths: layer -> λ per query head, instead of those that are configured.
        call: the `generate` that this code is in.
        listeners: who wants to know, the outermost first.
        source: of the `generate` around this code, where its passes begin by themselves.
        stretch: of a long sound that is being decoded.
    """

    off: bool = False
    saliency: Saliency | None = None
    strengths: Strengths | None = None
    call: Generation | None = None
    listeners: tuple[Listener, ...] = ()
    source: Source | None = None
    stretch: Stretch | None = None

    @property
    def balance(self) -> list[Tensor] | None:
        """Where the caller takes the load-balancing losses himself; None where they join the model's loss."""
        return next((own.losses for own in reversed(self.listeners) if own.losses is not None), None)


NOTHING = Scope()
"""Outside of all blocks."""


def scope_of(steering: object) -> Scope:
    """What holds here: of each kind the innermost block counts, and every listener."""
    compiling = torch.compiler.is_compiling()  # a graph must not depend on how many blocks are open
    held: dict[str, Any] = {}
    for entry in STACK.get() if compiling or not PULLED else entries_around():
        if entry.steering is steering:
            held[entry.kind] = (*held.get(LISTENER, ()), entry.value) if entry.kind == LISTENER else entry.value
    return Scope(**held) if held else NOTHING


def use_saliency(model: Any, saliency: Saliency) -> AbstractContextManager[Any]:
    """Steer this model's calls inside the block by what the user says, instead of by the model's own eyes.

    It holds for the thread or task that enters it. To say it for one call wherever that runs (a streamer's thread, a pool, a
    pipeline), give it to the call: `model.generate(..., saliency=...)`, `model(..., saliency=...)`.

    Args:
        model: a patched model.
        saliency: where to look; rows count as in `input_ids`, before `generate` expands them for beams.

    Raises:
        PatchError: the model is not patched, or its configuration steers no attention.
        SaliencyError: not a Saliency. That it fits the prompt is checked when the model is called.
    """
    steering = steering_of(model)
    check_statement(steering, saliency, "use_saliency takes a Saliency")
    return Block(steering, SAID, saliency)


def disable_steering(model: Any) -> AbstractContextManager[Any]:
    """Run this model's calls inside the block, in this thread, exactly as if it were not patched.

    Raises:
        PatchError: the model is not patched.
    """
    return Block(steering_of(model), OFF, True)


def listen(model: Any, listener: Listener) -> AbstractContextManager[Any]:
    """Tell somebody what happens in this model's calls inside the block, in this thread.

    Raises:
        PatchError: the model is not patched.
    """
    return Block(steering_of(model), LISTENER, listener)


def check_statement(steering: Any, saliency: Any, asked: str) -> None:
    """SaliencyError for something else than a statement, PatchError where no gaze could follow it."""
    if not isinstance(saliency, Saliency):
        raise SaliencyError(f"{asked}, such as Saliency.from_boxes(...); got {type(saliency).__name__}.")
    if steering.plan.config.attention is None:
        raise PatchError("this model's SteerConfig has attention=None, so there is no gaze to steer; see AttentionConfig.")


def take_statement(steering: Any, kwargs: dict[str, Any]) -> tuple[Saliency | None, dict[str, Any]]:
    """What a call itself says, and its other arguments."""
    if STATEMENT not in kwargs:
        return None, kwargs
    said = kwargs[STATEMENT]
    if said is not None:
        check_statement(steering, said, f"{STATEMENT}= takes a Saliency")
    return said, {name: value for name, value in kwargs.items() if name != STATEMENT}


def steering_of(model: Any) -> Any:
    """The steering of a patched model, also inside PEFT's, DDP's, FSDP's or torch.compile's wrappers.

    Raises:
        PatchError: the model is not patched.
    """
    steering = find_steering(model)
    if steering is None:
        raise PatchError(f"this {type(model).__name__} is not patched; call hf_steer.patch_model(model, config) first.")
    return steering


def find_steering(model: Any) -> Any | None:
    """The steering of a model or of the model that it wraps; None when there is none."""
    if not isinstance(model, nn.Module):
        return None
    own = model._modules.get(STEERING)
    if own is not None:
        return own
    return next((module for name, module in model.named_modules() if name.rpartition(".")[2] == STEERING), None)
