"""How the gaze begins a pass: whether it is steered, what it goes on with, and what is new in it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from hf_steer.errors import PatchError, SaliencyError
from hf_steer.ground.arguments import Given
from hf_steer.ground.implementations import IMPLEMENTATION
from hf_steer.patching.blocks import held_elsewhere
from hf_steer.patching.gaze.apart import follow_source, refuse_regrown, unexpanded, with_own_labels
from hf_steer.patching.gaze.crossing import begin_crossing
from hf_steer.patching.gaze.ledger import refuse_longer
from hf_steer.patching.gaze.memory import note_unseen, read_state
from hf_steer.patching.gaze.prompt import read_prompt
from hf_steer.patching.passes import Pass
from hf_steer.patching.planned import Plan
from hf_steer.patching.scopes import SAID, Scope
from hf_steer.saliency import Saliency

UNSEEN = (
    "Start with a fresh cache and the whole conversation, give one score per token with Saliency.from_tokens(...), or run inside "
    "disable_steering(model)."
)


def begin_gaze(steering: Any, current: Pass, given: Given, said: Saliency | None) -> None:
    """Settle for one pass whether it is steered, and with what: fills the gaze's part of it.

    Args:
        steering: of the model.
        current: the pass.
        given: its arguments.
        said: what the call itself says.

    Raises:
        PatchError: a pass inside `generate` that belongs to nobody; an implementation that cannot be steered.
        SaliencyError: keys in the cache that hf_steer has not seen; what is said does not fit.
    """
    plan, scope, sees, compiling = steering.plan, current.scope, steering.gaze.sees, torch.compiler.is_compiling()
    current.decided, current.tokens, current.source = given.source is not None, given.ids, given.source
    follow_implementation(steering.gaze)
    if scope.off:
        _pass_over(scope, given)
        return
    current.backend = plan.config.attention.backend
    if plan.anatomy.attends == "cross":
        _begin_across(steering, current, given, said)
        return
    current.state = state = None if given.cache is None else read_state(given.cache)
    call = scope.call
    owned = call is not None and call.owns(given, state, said, scope.saliency, sees=sees)
    if call is not None and owned:
        current.statement, admitted = call.statement, call.admit(given, state)
        if admitted is not None and call.prompt is not None:
            current.prompt, current.state = admitted
            current.prompt_end = call.prompt.first_position + call.prompt.shape[1]
            current.records, current.steers = call.records, True
    else:
        current.statement = scope.saliency if said is None else said
        if current.statement is None:
            warn_of_others(steering)
    asked = current.statement is not None or sees or (state is not None and state.speaks)
    if not owned:
        if scope.source is not None:
            follow_source(current, given)
        _begin_alone(steering, current, given)
    if asked and steering.gaze.functions.unfit:
        raise PatchError(steering.gaze.functions.unfit)
    if compiling:
        _settle_compiled(steering, current, asked=asked)


def follow_implementation(gaze: Any) -> None:
    """Let a model's steered modules go with it to another attention implementation, which may be set at any time."""
    anatomy, functions = gaze.plan.anatomy, gaze.functions
    decoder, tower = functions.implementations
    changed = decoder is not None and (getattr(anatomy.decoder.config, IMPLEMENTATION) or "eager") != decoder
    if changed or (tower is not None and (getattr(anatomy.tower.config, IMPLEMENTATION) or "eager") != tower):
        functions.follow()


def _begin_across(steering: Any, current: Pass, given: Given, said: Saliency | None) -> None:
    """The same for a gaze at what an encoder hands on."""
    begin_crossing(current, given, said)
    if current.statement is None:
        warn_of_others(steering)
    follow_source(current, given)
    if current.steers and (not current.decided or given.count_tokens() > 1):
        prompt = read_prompt(unexpanded(given, current.scope.source), steering.plan, None, past=int(given.past), whole=False)
        current.prompt = with_own_labels(prompt, current) if steering.pairs else prompt
    if current.steers and steering.gaze.functions.unfit:
        raise PatchError(steering.gaze.functions.unfit)
    _settle_compiled(steering, current, asked=current.steers)


def _settle_compiled(steering: Any, current: Pass, *, asked: bool) -> None:
    """In a graph layers cannot find their bias, since what a thread is in cannot be read there: PatchError where one is asked."""
    if steering.gaze.by_keyword or not torch.compiler.is_compiling():
        return
    if asked and current.steers:
        raise PatchError(
            f"{type(steering.plan.anatomy.decoder).__name__} hands no keyword arguments on to its attention, so its bias is read "
            "from the pass that is running, which a compiled model cannot. Compile its layers one by one, or run it uncompiled."
        )
    current.steers = False


def _pass_over(scope: Scope, given: Given) -> None:
    """A pass that the caller wants unsteered; what goes into a cache meanwhile is not known later."""
    if torch.compiler.is_compiling():
        return
    if scope.call is not None:
        scope.call.started = True
    if given.perceives:
        note_unseen(given.cache)


def _begin_alone(steering: Any, current: Pass, given: Given) -> None:
    """A pass by itself: of a loop of the caller's own, in training, or one that was asked for by itself."""
    plan, state = steering.plan, current.state
    past = given.past
    if isinstance(past, Tensor) and given.count_tokens() > 1 and not torch.compiler.is_compiling():
        past = int(past)
    if state is not None and state.unseen is not None and (unseen := state.unseen_among(int(past))):
        refuse_unseen(plan, current.statement, unseen)
    current.steers = _continues(current, given, past)
    if current.steers:
        return
    if current.scope.source is not None:
        refuse_regrown(current, given)
        given = unexpanded(given, current.scope.source)
    if given.ids is None and not int(past):
        refuse_longer(given, None if current.statement is None else current.statement.tokens)
    current.prompt = read_prompt(given, plan, current.statement, past=int(past), whole=False)
    if steering.pairs:
        current.prompt = with_own_labels(current.prompt, current)
    if current.prompt is not None and state is None and int(past):
        refuse_unseen(plan, current.statement, int(past))
    current.steers = current.prompt is not None


def _continues(current: Pass, given: Given, past: int | Tensor) -> bool:
    """More text on a cache that has its state, and nothing new to see or said: no look at the tokens is needed."""
    state = current.state
    if state is None or given.image_pixels is not None or given.video_pixels is not None or given.encoded is not None:
        return False
    count = given.count_tokens()
    if isinstance(past, int):
        if past == 0:
            return False
        state = current.state = state.until(past)
    if current.statement is not None:
        # token scores speak of the prompt that they were first used with
        tokens = current.statement.tokens
        return current.statement is state.statement and (count == 1 or (tokens is not None and tokens.shape[1] != past + count))
    return count == 1


def refuse_unseen(plan: Plan, statement: Saliency | None, past: int, ids: Tensor | None = None) -> None:
    """SaliencyError where pictures may stand among keys that were cached while the model was not steered.

    Args:
        plan: of the model.
        statement: what the user says; one score per token needs no pictures.
        past: how many keys there are.
        ids: their tokens, where they are known.
    """
    if statement.tokens is not None if statement is not None else not plan.sees:
        return
    placeholders = torch.tensor(list(plan.anatomy.placeholder_ids.values()))
    if ids is not None and not bool(torch.isin(ids.cpu(), placeholders).any()):
        return
    raise SaliencyError(
        f"the cache holds {past} keys that hf_steer has not seen: they were cached before patching or inside disable_steering, so "
        f"where pictures and sounds stand among them, and what was seen in them, is unknown. {UNSEEN}"
    )


def warn_of_others(steering: Any) -> None:
    """Once per patch: somebody says where to look, but not to this call."""
    if torch.compiler.is_compiling() or steering.warned or not held_elsewhere(steering, SAID):
        return
    steering.warned = True
    warnings.warn(
        "this call of a patched model says nothing about where to look, while a use_saliency block is open in another thread: "
        "a block holds where it was entered alone. To say it for one call wherever it runs, give it to "
        "the call: model.generate(..., saliency=...) or model(..., saliency=...). If this call is meant to be unsteered, run it "
        "inside disable_steering(model).",
        stacklevel=2,
    )
