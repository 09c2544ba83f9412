"""What holds for a stretch of the caller's code, thread by thread: the saliency in force, and the prompt of `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_steer.errors import PatchError, SaliencyError
from hf_steer.patching.blocks import Block, held
from hf_steer.patching.gaze.memory import CacheState
from hf_steer.saliency import EyeRecord, Saliency
from hf_steer.values import Span

if TYPE_CHECKING:
    from hf_steer.patching.gaze.arrange import Arrangement

STEERING = "hf_steer"
"""Name of the submodule that a patched model carries, and of the keyword argument that rides through a forward pass."""
STATEMENT = "saliency"
"""The keyword argument of `generate` and of the model itself that says where to look in that one call."""
SAID, OFF = "saliency", "off"
"""Kinds of blocks: what the user says, and that steering is off."""


class Enough(Exception):
    """Raised inside a pass whose rest need not run: what was wanted has been read. It never leaves the package."""


@dataclass(frozen=True)
class Prompt:
    """What a call says about its input, before anything ran.

    Attributes:
        ids: `(batch, tokens)`; None when only embeddings came.
        shape: batch and tokens.
        first_position: key position of the first token: 0, or the cache's length when only new tokens came.
        real: `(batch, first_position + tokens)` bool, False for padding; None when no mask came.
        encoded: modality -> what the patched tower recorded earlier, for encoder outputs that the caller passed in.
        raw: modalities whose pixels come with the call, in the order in which the model encodes them.
        arrangements: modality -> how a LLaVA lays out what its tower sees as tokens, where its eyes are wanted.
        spans: pictures and videos that this prompt adds to the cache.
        labelled: `(batch, tokens)` bool, True where the next token is a label; None without labels.
    """

    ids: Tensor | None
    shape: tuple[int, int]
    first_position: int
    real: Tensor | None
    encoded: Mapping[str, EyeRecord]
    raw: tuple[str, ...]
    arrangements: Mapping[str, Arrangement]
    spans: tuple[Span, ...]
    labelled: Tensor | None


@dataclass
class GenerateScope:
    """One call of `generate`: its whole prompt, known before chunks, beams and encoding take it apart; and its ledger.

    Attributes:
        prompt: None for a draft by the model itself, whose passes are not steered: the steered ones check it.
        statement: what the call itself, or the block around it, says.
        block: what the block around it says.
        past: keys in its cache when it began.
        asks: whether anything is to be steered in it: something is said, or there is something to see.
        guided: classifier-free guidance runs passes of its own, which see no prompt and are unsteered by design.
        drafts: the model drafts for itself.
        records: what the vision tower recorded for it.
        started: whether its first pass has come.
        state: of a `generate` without a cache.
        steered: passes that went on with the prompt's saliency.
        unconditional: passes of guidance, which are unsteered by design.
        compiled: some passes were compiled, and not counted.
    """

    prompt: Prompt | None
    statement: Saliency | None = None
    block: Saliency | None = None
    past: int = 0
    asks: bool = False
    guided: bool = False
    drafts: bool = False
    records: list[EyeRecord] = field(default_factory=list)
    started: bool = False
    state: CacheState | None = None
    steered: int = 0
    unconditional: int = 0
    compiled: bool = False


_SCOPES: ContextVar[Mapping[int, GenerateScope]] = ContextVar("hf_steer_scopes", default={})  # noqa: B039 - never mutated
_SINKS: ContextVar[Mapping[int, list[EyeRecord]]] = ContextVar("hf_steer_sinks", default={})  # noqa: B039 - never mutated


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


def statement_for(steering: object) -> tuple[bool, Saliency | None]:
    """Whether steering is on for this code, and what the user says, if anything."""
    if held(steering, OFF) is not None:
        return False, None
    return True, held(steering, SAID)


def scope_for(steering: object) -> GenerateScope | None:
    """The call of `generate` that this thread is in."""
    return _SCOPES.get().get(id(steering))


def collect_records(steering: object, sink: list[EyeRecord] | None) -> None:
    """What the vision tower records in this thread goes to `sink`, until the decoder of that pass ends it with None."""
    sinks = _SINKS.get()
    if sink is not None:
        _SINKS.set({**sinks, id(steering): sink})
    elif id(steering) in sinks:
        _SINKS.set({key: records for key, records in sinks.items() if key != id(steering)})


def sink_for(steering: object) -> list[EyeRecord] | None:
    """Where records go: to the call of `generate` that this thread is in, which encodes before its passes, or to its pass."""
    scope = scope_for(steering)
    return _SINKS.get().get(id(steering)) if scope is None else scope.records


@contextmanager
def generate_scope(steering: object, scope: GenerateScope) -> Iterator[GenerateScope]:
    """Hold a prompt for the forward passes of one call of `generate`."""
    token = _SCOPES.set({**_SCOPES.get(), id(steering): scope})
    try:
        yield scope
    finally:
        _SCOPES.reset(token)
