"""How a forward pass begins: what it goes on with, and that no pass of a `generate` which speaks is left out unseen.

The receipt says, pass by pass, which layers added their bias; the ledger says which passes of one `generate` were steered, and
which are unsteered by design. What is neither raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.errors import PatchError, SaliencyError
from hf_steer.ground.arguments import Given
from hf_steer.ground.caches import past_of
from hf_steer.ground.implementations import sees_by_itself
from hf_steer.patching.blocks import held_elsewhere, steerings_with
from hf_steer.patching.gaze.memory import note_unseen, read_state
from hf_steer.patching.gaze.runtime import Ride, begins_prompt, read_prompt
from hf_steer.patching.planned import Plan
from hf_steer.patching.scopes import OFF, SAID, STATEMENT, GenerateScope, scope_for, statement_for
from hf_steer.patching.unchanged import Place, refuse_replaced, still_there
from hf_steer.saliency import Saliency

UNSEEN = (
    "Start with a fresh cache and the whole conversation, give one score per token with Saliency.from_tokens(...), or run inside "
    "disable_steering(model)."
)
VIRTUAL = (
    "(PEFT's prompt or prefix tuning adds them), so scores would land on other tokens than they were given for. Run it inside "
    "disable_steering(model), or use an adapter without virtual tokens, such as LoRA."
)


def begin_pass(steering: Any, given: Given, said: Saliency | None, *, last: bool) -> Ride | None:
    """Start a ride for one forward pass, or none where nothing is to be steered.

    Args:
        steering: of the model.
        given: the arguments of the pass.
        said: what the call itself says.
        last: whether the decoder itself asks, the last to do so: a pass is written down once.

    Raises:
        PatchError: a pass inside `generate` that belongs to nobody.
        SaliencyError: keys in the cache that hf_steer has not seen; what is said does not fit.
    """
    plan, scope = steering.plan, scope_for(steering)
    enabled, block = statement_for(steering)
    if not enabled:
        if scope is not None and not torch.compiler.is_compiling():
            scope.started = True  # unsteered because the caller says so
        if given.perceives and not torch.compiler.is_compiling():
            note_unseen(given.cache)
        return None
    state = read_state(given.cache)
    ride = Ride(backend=plan.config.attention.backend, state=state, statement=said, tokens=given.ids)
    if not torch.compiler.is_compiling():
        ride.sites = steering.gaze.sites
    belongs = scope is not None and said is None and (scope.prompt is None or block is scope.block)
    if scope is not None and belongs and not _is_foreign(ride, scope, given, sees=plan.sees):
        ride.statement = scope.statement
        refuse_changes(steering, ride)
        return _begin_in_generate(ride, scope, given, last=last)
    if said is None:
        ride.statement = block
        if block is None:
            warn_of_others(steering)
    refuse_changes(steering, ride)
    past = past_of(given.cache)
    if isinstance(past, Tensor) and given.count_tokens() > 1 and not torch.compiler.is_compiling():
        past = int(past)
    if state is not None and state.unseen is not None and (unseen := state.unseen_among(int(past))):
        refuse_unseen(plan, ride.statement, unseen)
    if _continues(ride, given, past):
        return ride
    tokens = None if ride.statement is None else ride.statement.tokens
    if given.ids is None and tokens is not None and given.count_tokens() > tokens.shape[1] and not int(past):
        raise SaliencyError(
            f"the saliency speaks of {tokens.shape[1]} tokens, and {given.count_tokens()} embeddings came: virtual tokens may have "
            f"come before the prompt {VIRTUAL}"
        )
    ride.prompt = read_prompt(given, plan, ride.statement, past=int(past), whole=False)
    if ride.prompt is not None and state is None and int(past):
        refuse_unseen(plan, ride.statement, int(past))
    return ride if ride.prompt is not None else None


def refuse_changes(steering: Any, ride: Ride) -> None:
    """PatchError where this pass is to be steered, and steered modules, or their configs, are others than at patching."""
    asked = ride.statement is not None or steering.plan.sees or (ride.state is not None and ride.state.speaks)
    if asked and not torch.compiler.is_compiling():
        refuse_replaced(steering.gaze.places)


def _is_foreign(ride: Ride, scope: GenerateScope, given: Given, *, sees: bool) -> bool:
    """Whether a later pass on a cache of its own stands for itself, as it would outside: nothing was asked of this one."""
    if scope.prompt is None or scope.asks or scope.guided or not scope.started or torch.compiler.is_compiling():
        return False
    return ride.state is None and not (sees and given.perceives)


def _begin_in_generate(ride: Ride, scope: GenerateScope, given: Given, *, last: bool) -> Ride | None:
    """The first pass gets the prompt, and so does every other on a fresh cache; later ones go on with what their cache carries."""
    prompt, cache = scope.prompt, given.cache
    if prompt is None:
        return None
    ride.prompt_end = prompt.first_position + prompt.shape[1]
    compiling = torch.compiler.is_compiling()
    if not scope.started:
        if not compiling and scope.asks:
            _refuse_virtual(given, scope)
        scope.started = True
        ride.prompt, ride.records = prompt, scope.records
    elif ride.state is None and scope.guided and scope.steered > scope.unconditional:
        # guidance's own pass follows each of the prompt's; what it reads may begin as the prompt does
        scope.unconditional += last and not compiling
        return None
    elif cache is None and scope.state is not None and begins_prompt(given, prompt):
        ride.state = scope.state
    elif ride.state is None:
        if not compiling and int(past_of(cache)) == scope.past and begins_prompt(given, prompt):
            ride.prompt, ride.records = prompt, scope.records
        elif scope.guided or not scope.asks:
            scope.unconditional += last and not compiling
            return None
        else:
            raise PatchError(
                "a forward pass inside generate is not one of generate's own, or came on a cache that has lost its saliency: it "
                f"brings {given.count_tokens()} tokens on a cache of {int(past_of(cache))} keys, and neither begins with the "
                "prompt nor goes on after it. Where a logits processor or stopping criterion calls the model, do it inside "
                "disable_steering(model), or say where that call looks: model(..., saliency=...)."
            )
    if compiling:
        scope.compiled = True  # a graph would be made anew for every count
    else:
        scope.steered += 1
    return ride


def close_ledger(scope: GenerateScope) -> None:
    """At the end of a `generate`: every pass was steered, or was unsteered by design.

    Raises:
        PatchError: no pass came by, or more than guidance accounts for went without.
    """
    if scope.prompt is None or not scope.asks:
        return
    if not scope.started:
        raise PatchError(
            "generate ran, and none of its forward passes reached hf_steer's hooks, so nothing was steered: the hooks were "
            "removed, or the model's forward is called directly. Patch the model again: hf_steer.unpatch_model(model), then "
            "patch_model."
        )
    if scope.guided and not scope.compiled and scope.unconditional > scope.steered > 0:
        raise PatchError(
            f"{scope.unconditional} passes of a generate with guidance went unsteered beside {scope.steered} steered ones; "
            "guidance accounts for as many at most. A cache lost its saliency; please report this with the model's name."
        )


def _refuse_virtual(given: Given, scope: GenerateScope) -> None:
    """Prompt tuning puts tokens before the prompt after `generate` was called: scores would land on them."""
    prompt = scope.prompt
    if prompt is None:
        return
    past, tokens = int(past_of(given.cache)), given.tokens()
    more = past - scope.past
    if more == 0 and tokens is not None and tokens.ndim == 3 and prompt.ids is not None and given.ids is None:
        more = tokens.shape[1] - (prompt.first_position + prompt.shape[1] - past)
    if more > 0:
        raise SaliencyError(f"{more} virtual tokens came before the prompt that generate was called with {VIRTUAL}")


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


def _continues(ride: Ride, given: Given, past: int | Tensor) -> bool:
    """More text on a cache that has its state, and nothing new to see or said: no look at the tokens is needed."""
    state, count = ride.state, given.count_tokens()
    if state is None or given.pixels("image") is not None or given.pixels("video") is not None or given.encoded is not None:
        return False
    if isinstance(past, int):
        if past == 0:
            return False
        state = ride.state = state.until(past)
    if ride.statement is not None:
        # token scores speak of the prompt that they were first used with
        tokens = ride.statement.tokens
        return ride.statement is state.statement and (count == 1 or (tokens is not None and tokens.shape[1] != past + count))
    return count == 1


def check_receipt(ride: Ride, decoder: nn.Module, root: nn.Module, places: tuple[Place, ...], *, skips: bool) -> None:
    """After the decoder: every layer that was to be steered has added its bias.

    Args:
        ride: of the pass.
        decoder: that has run.
        root: of the model.
        places: of the steered layers.
        skips: whether this decoder leaves layers out at random, as LayerDrop does in training.

    Raises:
        PatchError: layers that ran, or should have, and did not.
    """
    missing = [layer for layer in ride.biases if layer not in ride.signed]
    if not missing or skips:
        return
    if torch.compiler.is_compiling():
        there = missing
    else:
        there = [place.site.index for place in still_there(decoder, root, places) if place.site.index in missing]
    if there:
        raise PatchError(
            f"layers {there} were to be steered in this pass and were not: their attention did not come to hf_steer's function. A "
            "wrapper or another library has replaced their forward, or they did not run. Patch the model after such changes, "
            "leave these layers out of attention.heads, or run inside disable_steering(model)."
        )


def refuse_stray(module: Any, options: Mapping[str, Any]) -> None:
    """A steered attention module runs in no pass that the decoder's hooks saw: PatchError where it was to be steered.

    A checkpoint that backward recomputes runs with the arguments of its pass, whatever is said around backward.

    Args:
        module: of the layer.
        options: that it is called with; what the call itself says is among them where no hook has taken it.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    own = [steering for steering in steerings_with(SAID, OFF) if module in steering.gaze.sites.values()]
    said = options.get(STATEMENT) is not None or any(statement_for(steering) != (False, None) for steering in own)
    by_itself = not own and sees_by_itself(module.config) and not torch.is_grad_enabled()  # checkpoints are recomputed anywhere
    if said or by_itself:
        raise PatchError(
            "a steered attention layer runs outside of any pass that hf_steer's hooks saw, so it is not steered: the hooks of the "
            "decoder were removed, or the layer is called by itself. Patch the model again (hf_steer.unpatch_model, then "
            "patch_model), or run inside disable_steering(model)."
        )
