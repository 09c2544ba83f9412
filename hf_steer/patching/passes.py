"""One forward pass of a patched model: what the hooks of both halves, gaze and aligners, tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from hf_steer.attention import CURRENT_PASS, SteeredCall
from hf_steer.ground.arguments import Given
from hf_steer.patching.blocks import is_running
from hf_steer.patching.gaze.biases import BiasMaker
from hf_steer.patching.gaze.memory import CacheState
from hf_steer.patching.gaze.prompt import Prompt
from hf_steer.patching.gaze.when import Pace
from hf_steer.patching.scopes import NOTHING, Scope
from hf_steer.saliency import EyeRecord, Saliency
from hf_steer.values import HeadBias, TokenScores


@dataclass(eq=False)
class Pass(SteeredCall):
    """One forward pass, from the model's call, or that of its decoder or tower alone, to its end.

    Attributes:
        steering: of the model; None in a compiled graph.
        given: what the model was called with.
        scope: what holds for the code that called it.
        by: the module whose call it is.
        alone: whether the decoder began it, called by itself.
        frame: of that call, while it runs.
        outer: the pass around it, of another model or of this one.
        said: what the call itself says.
        decided: whether it is settled if the gaze is steered in it.
        steers: whether it is.
        prompt: what is new in this pass; None when it only continues.
        prompt_end: key position after the prompt, inside `generate`.
        records: what the vision tower recorded for it.
        tokens: `(rows, queries)`; None when only embeddings came.
        source: the same, or the embeddings; None when neither came.
        statement: what the user says.
        state: of the cache, old when the pass begins and new when the decoder runs.
        raw: scores of a new prompt before they are normalised.
        pace: when it is steered.
        cache: as the decoder gets it.
        joined: whether the base model has been called by the root that began it.
        arrived: whether the decoder has got it.
        settled: whether its biases are made.
        bias_of: makes them.
        watched: whether the root model's own call surrounds it, so that its logits can be seen.
        perceives: whether pictures or sounds come with it.
        frames: which inputs or frames of the encoder are real, `(rows, inputs or frames)`.
        balances: weighted load-balancing losses so far; None when no loss is wanted.
        aligns: whether the aligners take part in it.
        trains: whether it is a training step with labels, of a model with aligners.
    """

    steering: Any = None
    given: Given | None = None
    scope: Scope = NOTHING
    by: Any = None
    alone: bool = False
    frame: FrameType | None = None
    outer: Any = None
    said: Saliency | None = None
    decided: bool = False
    steers: bool = False
    prompt: Prompt | None = None
    prompt_end: int | None = None
    records: list[EyeRecord] = field(default_factory=list)
    tokens: Tensor | None = None
    source: Tensor | None = None
    statement: Saliency | None = None
    state: CacheState | None = None
    raw: TokenScores | None = None
    pace: Pace | None = None
    cache: Any = None
    joined: bool = False
    arrived: bool = False
    settled: bool = False
    bias_of: BiasMaker | None = None
    watched: bool = False
    perceives: bool = False
    frames: Tensor | None = None
    balances: list[Tensor] | None = None
    aligns: bool = False
    trains: bool = False

    def brings(self, given: Given) -> bool:
        """Whether a decoder's call is this pass's, told by its tokens: models may drop the keyword on the way to it."""
        if self.source is None or given.source is None:
            return not self.decided
        return bool(given.source.shape[:2] == self.source.shape[:2])

    def over(self, layer: int, keys: int) -> HeadBias | None:
        """The bias of a layer that attends to another number of keys than was told; None where it is not known which."""
        return None if self.bias_of is None or torch.compiler.is_compiling() else self.bias_of.over(layer, keys)


def live_pass() -> Pass | None:
    """The innermost pass, of any model, whose call goes on in this thread.

    One that was interrupted is passed over: hooks that always run do not run on KeyboardInterrupt. And so is one that a copied
    context brings into another thread.
    """
    current: Pass | None = CURRENT_PASS.get()
    while current is not None and (current.frame is None or not is_running(current.frame)):
        current = current.outer
    return current


def pass_of(steering: Any) -> Pass | None:
    """The pass of this model that goes on in this thread."""
    if torch.compiler.is_compiling():
        return steering.compiled_pass  # type: ignore[no-any-return]
    current = live_pass()
    while current is not None and current.steering is not steering:
        current = current.outer
    return current
