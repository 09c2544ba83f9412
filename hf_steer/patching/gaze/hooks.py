"""The gaze's hooks on tower and decoder: what the tower saw, and from a pass to the bias of every steered layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.attention import say_once
from hf_steer.config import AttentionConfig
from hf_steer.config.manners import AUTO, MANNERS
from hf_steer.errors import PatchError
from hf_steer.ground.arguments import read_call
from hf_steer.ground.caches import keys_seen, past_of
from hf_steer.ground.decoders import checkpoints, skips_layers
from hf_steer.ground.outputs import logits_in, put_record
from hf_steer.ground.pictures import window_of
from hf_steer.patching.edits import AddHook, SetAttentionFunction
from hf_steer.patching.gaze.begin import begin_gaze
from hf_steer.patching.gaze.biases import BiasMaker
from hf_steer.patching.gaze.crossing import state_across
from hf_steer.patching.gaze.first_pass import look_at_prompt
from hf_steer.patching.gaze.functions import Functions
from hf_steer.patching.gaze.masking import Masking
from hf_steer.patching.gaze.memory import write_state
from hf_steer.patching.gaze.receipt import refuse_unsigned
from hf_steer.patching.gaze.scores import resolve_state
from hf_steer.patching.gaze.when import ALWAYS, PassFacts, gates_after, pace
from hf_steer.patching.passes import Pass, pass_of
from hf_steer.patching.planned import Plan, Strengths
from hf_steer.patching.scopes import STEERING, scope_of, take_statement
from hf_steer.patching.unchanged import place_of
from hf_steer.saliency import EyeRecorder, record_with


class Gaze(nn.Module):
    """The hooks that steer attention; a call's own state rides on its arguments and on its cache."""

    def __init__(self, plan: Plan, owner: nn.Module) -> None:
        super().__init__()
        self.plan = plan
        self.owner: tuple[Any, ...] = (owner,)  # in a tuple, so that it does not become a submodule of its own submodule
        anatomy = plan.anatomy
        self.attention: AttentionConfig = plan.config.attention or AttentionConfig()
        self.places = tuple(
            place_of(anatomy.root, site) for site in anatomy.layers if site.index in plan.strengths or site.index in plan.readers
        )
        self.covers = frozenset(place.site.module for place in self.places)
        by_mask = self.places if anatomy.carried == "mask" else ()
        self.masking = Masking(by_mask, sees=plan.sees, crosses=anatomy.attends == "cross")
        self.functions = Functions(plan, self.places)
        self.slots = {site.index: site.slot for site in anatomy.layers}
        self.by_keyword, self.crosses = anatomy.carried == "keyword", anatomy.attends == "cross"
        remembers = plan.patterns is not None or self.attention.gate is not None
        self.paces = remembers or self.attention.phase_factors != (1.0, 1.0, 1.0)
        generates = bool(getattr(anatomy.root, "can_generate", bool)())  # elsewhere no token comes out of a query
        left_open = self.attention.queries == AUTO and self.attention.schedule is None
        open_kinds = MANNERS if left_open and generates else ()
        self.opens = tuple(kind for kind in open_kinds if self.attention.phases(kind)[0] != 1.0)
        self.remembers, self.sees, self.learns = remembers, plan.sees, plan.config.learns_strength
        self.open = self.attention.strength == AUTO and self.attention.share is None  # what is said decides how hard

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Out of a pickle, perhaps in another process, which knows nothing of our functions."""
        super().__setstate__(state)
        self.functions.register()

    def edits(self) -> Iterator[SetAttentionFunction | AddHook]:
        """All that the gaze changes, in the order of change."""
        anatomy = self.plan.anatomy
        yield from self.masking.edits()
        yield from self.functions.edits()
        if self.plan.eyes:
            yield AddHook(anatomy.tower, "before", self.before_tower)
            yield AddHook(anatomy.tower, "finally", self.after_tower)
        yield AddHook(anatomy.decoder, "before", self.before_decoder)
        yield AddHook(anatomy.decoder, "finally", self.after_decoder)

    def before_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Vision tower: let a recorder watch it when the model's own eyes are wanted."""
        current, scope = kwargs.pop(STEERING, None), scope_of(self.owner[0])
        statement = scope.saliency
        if isinstance(current, Pass):
            statement = current.statement
        elif scope.call is not None and scope.call.steers and statement is None:
            statement = scope.call.statement
        continues = current is not None and (not isinstance(current, Pass) or current.prompt is None)
        wanted = not scope.off and statement is None and not continues
        saliency = self.attention.saliency
        record_with(EyeRecorder(str(saliency.source), saliency.options) if wanted else None)
        return args, kwargs

    def after_tower(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Vision tower: leave the record on its output, which travels to the decoder even when the caller encodes first."""
        recorder, anatomy = record_with(None), self.plan.anatomy
        if recorder is None or output is None:  # not wanted, or interrupted
            return
        if anatomy.arrangement is None:
            window = window_of(module) if anatomy.windowed else None
            record = recorder.tokens(read_call(module, args, kwargs).grids, merge_size=anatomy.merge_size, window=window)
        else:
            record = recorder.pictures()
        current, call = pass_of(self.owner[0]), scope_of(self.owner[0]).call
        if current is not None and current.prompt is not None and not current.arrived:
            current.records.append(record)  # a LLaVA hands no arguments of ours on to its tower
        elif call is not None and call.steers:
            call.records.append(record)
        put_record(output, record)

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decoder: by now the tower has run; turn prompt, records and statement into this pass's biases."""
        current = kwargs.get(STEERING)
        if current is None:
            current, kwargs = self._take_up(module, args, kwargs)
        if isinstance(current, Pass):  # no first pass that looks for saliency
            current.arrived = True
            if current.steers:
                self._decide(current, module, args, kwargs)
                kwargs = {**kwargs, STEERING: current}
        if not self.by_keyword:  # the decoder would drop the keyword, or refuse it
            kwargs = {name: value for name, value in kwargs.items() if name != STEERING}
        return args, kwargs

    def _take_up(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
        """The pass of a decoder that no keyword tells: it is not steered, or called by itself, or what was begun got lost."""
        steering = self.owner[0]
        said, kwargs = take_statement(steering, kwargs)
        begun, scope = pass_of(steering), scope_of(steering)
        if begun is not None and (said is not None or begun.arrived or begun.scope != scope):  # a call of its own inside that one
            begun = None
        given = read_call(module, args, kwargs)
        if begun is not None and begun.decided and (not begun.steers or begun.brings(given)):
            return begun, kwargs
        if begun is not None and not begun.decided:  # of a model's call that brought no tokens
            begin_gaze(steering, begun, given, begun.said)
            return begun, kwargs
        current = Pass(given=given, scope=scope, by=module, alone=True, said=said)
        begin_gaze(steering, current, given, said)
        steering.enter(current)
        return current, kwargs

    def _decide(self, current: Pass, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """This pass's biases."""
        traced = any(listener.follows_steps for listener in current.scope.listeners)
        given = read_call(module, args, kwargs)
        tokens: Tensor = given.source if given.embeds is None else given.embeds
        (rows, queries), device, cache = tokens.shape[:2], tokens.device, given.cache
        matters = cache is not None and (current.prompt is not None or self.paces or traced or bool(self.opens))
        current.cache, past = cache, past_of(cache) if matters else 0
        gates = None  # what they remember of this cache, before a prompt makes a new state for it
        if (self.paces or traced) and current.state is not None and (current.prompt is None or int(past)):
            gates = current.state.for_rows(rows).gates
        if self.crosses:
            current.state = state_across(current, self.plan, given, rows=rows, device=device)
        elif current.prompt is not None:
            prompt, start = current.prompt, int(past)

            def look() -> Tensor:
                return look_at_prompt(self.plan, prompt, given, rows=rows, past=start, prompt_end=current.prompt_end)

            current.state = resolve_state(current, prompt, self.plan, rows=rows, past=start, device=device, look=look)
            for listener in current.scope.listeners:
                listener.scored(current)
        if current.state is None:
            raise PatchError("a forward pass of a patched model lost its steering state; please report this.")
        if len(current.state.scores.values) != rows:  # a cache whose rows were repeated since
            current.state = current.state.for_rows(rows)
        if cache is None and current.scope.call is not None:
            current.scope.call.state = current.state
        if not current.state.speaks:
            return
        current.pace = ALWAYS
        waits = bool(self.opens) and (current.state.kind in self.opens or current.state.scores.waits is not None)
        opens = waits and (queries > 1 or current.prompt is not None or _in_prompt(current, past))
        if opens and current.prompt_end is None and not current.scope.listeners:
            _warn_of_one_query(current, queries)
        if self.paces or traced or opens:
            facts = PassFacts(
                rows=rows, queries=queries, past=past if queries == 1 else int(past), device=device, cached=cache is not None,
                training=module.training and torch.is_grad_enabled(), tokens=current.tokens, prompt=current.prompt,
                prompt_end=current.prompt_end, gates=gates, traced=traced, watched=current.watched,
                kind=self.opens[0] if waits else "source",
            )  # fmt: skip
            current.pace = pace(self.attention, self.plan.patterns, facts)
        if not self.by_keyword:
            self._refuse_recomputed(module)
        strengths = self.strengths(current, device) if current.scope.strengths is not None or self.learns else self.plan.strengths
        if self.crosses:
            places = [(current.state.length, 0)] * len(strengths)
        else:
            places = keys_seen(cache, queries, tuple(map(self.slots.__getitem__, strengths)))
        state = current.state
        if self.open and current.scope.strengths is None:
            state = state.as_usual(self.plan.manners[state.kind].strength)
        current.bias_of = BiasMaker(
            state, strengths, places, cache=None if self.crosses else cache, queries=queries, gate=current.pace.factor,
            soon=current.pace.gate if opens else current.pace.factor, share=self.attention.share,
        )  # fmt: skip
        current.biases = current.bias_of.every()
        current.settled = True

    def _refuse_recomputed(self, decoder: Any) -> None:
        """PatchError where layers run again in backward, when the pass that they find their bias in is over."""
        if decoder.training and torch.is_grad_enabled() and checkpoints(decoder):
            raise PatchError(
                f"{type(decoder).__name__} hands no keyword arguments on to its attention, so its bias is read from the pass that "
                "is running, and gradient checkpointing runs layers again when that is over. Train without it "
                "(model.gradient_checkpointing_disable()), or inside disable_steering(model)."
            )

    def strengths(self, current: Pass, device: torch.device) -> Strengths:
        """Layer -> λ per query head in this pass: as its caller says, learned, or configured."""
        if current.scope.strengths is not None:
            return current.scope.strengths
        learned = self.owner[0].learned
        return self.plan.strengths if learned is None else learned.strengths(device)

    def after_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Decoder: check the receipt; the keys are in the cache now, the caller's or its own, so the state goes there, too."""
        told = STEERING in kwargs
        current = kwargs[STEERING] if told else pass_of(self.owner[0])
        if not isinstance(current, Pass):
            return
        told = told or (not self.by_keyword and current.settled)
        if current.alone and current.by is module:
            self.owner[0].leave(current)
        if not told or output is None or not current.steers or current.state is None:  # interrupted, or nothing to steer
            return
        missing = [layer for layer in current.biases if layer not in current.signed]
        if missing and not (module.training and skips_layers(module)):
            refuse_unsigned(missing, module, self.plan.anatomy.root, self.places)
        if not current.watched and current.pace is not None and current.pace.before is not None:  # the root's hooks do not run
            current.state = dataclasses.replace(current.state, gates=gates_after(current.pace, self.attention, None))
        current.state = write_state(current.state, current.cache, output)

    def after_model(self, current: Pass, output: Any) -> None:
        """Root: its logits are known; the gates of the next step come from them."""
        listeners = [listener for listener in current.scope.listeners if listener.follows_steps]
        if current.state is None or not (self.remembers or listeners) or current.pace is None or current.pace.before is None:
            return
        if self.plan.anatomy.root.get_output_embeddings() is None:
            raise PatchError(
                "think tags, gates and traces follow what a model says, and this one has no language-modelling head. Patch the "
                "model with its head (AutoModelForCausalLM, AutoModelForImageTextToText), or use queries='all' or 'generated'."
            )
        logits = logits_in(output)
        state = dataclasses.replace(current.state, gates=gates_after(current.pace, self.attention, logits))
        write_state(state, None, output)
        for listener in listeners:
            listener.generated(current, logits, self._effective(current, logits.device))

    def _effective(self, current: Pass, device: torch.device) -> Strengths:
        """The strengths of this pass with what the configuration leaves open filled in; NaN where a share says how hard."""
        strengths = self.strengths(current, device)
        if current.scope.strengths is not None or self.attention.strength != AUTO or current.state is None:
            return strengths
        usual = self.plan.manners[current.state.kind].strength if self.attention.share is None else math.nan
        return {layer: tuple(value and value * usual for value in values) for layer, values in self.plan.strengths.items()}


def _in_prompt(current: Pass, past: int | Tensor) -> bool:
    """Whether a single token may be a piece of a prompt; a static cache keeps its length on the device, which is not asked."""
    return current.prompt_end is not None and (not isinstance(past, int) or past < current.prompt_end - 1)


def _warn_of_one_query(current: Pass, queries: int) -> None:
    """Once: whoever reads all logits of a pass may think that all of them were steered."""
    prompt, given = current.prompt, current.given
    one = given is not None and given.logits_kept == 1
    if torch.compiler.is_compiling() or one or queries == 1 or prompt is None or prompt.labelled is not None:
        return
    say_once(
        "this forward pass is none of generate's and no labels reached it (PEFT and label smoothing take them out on the way), so "
        "where text is pointed at only the last token of each row is steered in it, as in generate. If all its tokens are to be, "
        "patch with queries='all'; queries='generated' says that this is meant."
    )
