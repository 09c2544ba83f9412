"""The gaze's hooks: from a prompt, what the tower saw and what the user says to the bias of every steered layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.attention import UNSTEERED, enter_pass, recording_attention, registered_name, steered_attention
from hf_steer.errors import PatchError
from hf_steer.ground.arguments import Given, read_call
from hf_steer.ground.attention_call import declared_unknown
from hf_steer.ground.caches import past_of
from hf_steer.ground.decoders import skips_layers
from hf_steer.ground.implementations import function_of, implementation_of, register_function
from hf_steer.ground.outputs import caches_in, logits_in, put_record
from hf_steer.ground.pictures import window_of
from hf_steer.patching.edits import AddHook, SetAttentionFunction
from hf_steer.patching.gaze.first_pass import look_at_prompt
from hf_steer.patching.gaze.ledger import begin_pass, check_receipt, refuse_stray
from hf_steer.patching.gaze.memory import write_state
from hf_steer.patching.gaze.runtime import Ride, make_biases, resolve_state
from hf_steer.patching.gaze.when import PassFacts, gates_after, pace
from hf_steer.patching.planned import Plan
from hf_steer.patching.scopes import (
    STEERING,
    collect_records,
    scope_for,
    sink_for,
    statement_for,
    take_statement,
)
from hf_steer.patching.strength import strengths_for
from hf_steer.patching.unchanged import place_of, refuse_other_implementation
from hf_steer.patching.watching.reading import tell_reader
from hf_steer.patching.watching.trace import mean_strength, trace_of
from hf_steer.saliency import EyeRecorder, Saliency, record_with


class Gaze(nn.Module):
    """The hooks that steer attention; a call's own state rides on its arguments and on its cache."""

    def __init__(self, plan: Plan, owner: nn.Module) -> None:
        super().__init__()
        self.plan = plan
        self.owner: tuple[nn.Module, ...] = (owner,)  # in a tuple, so that it does not become a submodule of its own submodule
        anatomy = plan.anatomy
        decoder = None if anatomy.decoder is None else implementation_of(anatomy.decoder.config)
        tower = None if anatomy.tower is None else implementation_of(anatomy.tower.config)
        self.implementations = decoder, tower
        self.function = registered_name(str(decoder), "gaze", anatomy.family)
        self.eyes_function = "" if anatomy.tower is None else registered_name(str(tower), "eyes", anatomy.tower.config.model_type)
        self.sites = {site.index: site.module for site in anatomy.layers if site.index in plan.strengths}
        self.places = tuple(
            place_of(anatomy.root, site)
            for site in anatomy.layers
            if site.index in plan.strengths or site.index in plan.readers
        )
        self.files = (
            type(self.places[0].site.module).__module__ if self.places else None,
            type(plan.eyes[0].module).__module__ if plan.eyes else None,
        )

    def register_functions(self) -> None:
        """Make our attention functions known in this process; a registry entry changes no model."""
        if self.files[0] is not None:
            implementation = str(self.implementations[0])
            inner = function_of(implementation, self.files[0])
            declared_unknown(inner)  # looked up before anything is compiled
            steer = partial(steered_attention, inner=inner, implementation=implementation, stray=refuse_stray)
            register_function(self.function, steer)
        if self.files[1] is not None:
            inner = function_of(str(self.implementations[1]), self.files[1])
            register_function(self.eyes_function, partial(recording_attention, inner=inner))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Out of a pickle, perhaps in another process, which knows nothing of our functions."""
        super().__setstate__(state)
        self.register_functions()

    @property
    def steering(self) -> Any:
        """What holds for a stretch of the caller's code is kept under the steering."""
        return self.owner[0]

    def edits(self) -> Iterator[SetAttentionFunction | AddHook]:
        """All that the gaze changes, in the order of change."""
        anatomy = self.plan.anatomy
        for place in self.places:
            yield SetAttentionFunction(place.site.module, self.function, sees=self.plan.sees)
        for site in self.plan.eyes:
            yield SetAttentionFunction(site.module, self.eyes_function)
        if self.plan.eyes:
            yield AddHook(anatomy.tower, "before", self.before_tower)
            yield AddHook(anatomy.tower, "finally", self.after_tower)
        yield AddHook(anatomy.decoder, "before", self.before_decoder)
        yield AddHook(anatomy.decoder, "finally", self.after_decoder)
        yield AddHook(anatomy.root, "after", self.after_model)
        for module in {id(module): module for module in (anatomy.base, anatomy.root)}.values():
            if module is not anatomy.decoder:
                yield AddHook(module, "after", self.after_base)
            yield AddHook(module, "before", self.before_model)

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Root and base model: read the prompt, which the decoder no longer sees. PEFT calls only the base model."""
        if STEERING in kwargs:
            return None
        said, kwargs = take_statement(self.steering, kwargs)
        ride = self._begin(read_call(module, args, kwargs), said)
        if ride is None:
            return args, kwargs
        ride.watched = module is self.plan.anatomy.root
        if self.plan.eyes and ride.prompt is not None:
            collect_records(self.steering, ride.records)  # a LLaVA hands no arguments of ours on to its tower
        return args, {**kwargs, STEERING: ride}

    def before_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Vision tower: let a recorder watch it when the model's own eyes are wanted."""
        ride = kwargs.pop(STEERING, None)
        enabled, statement = statement_for(self.steering)
        scope = scope_for(self.steering)
        if isinstance(ride, Ride):
            statement = ride.statement
        elif scope is not None and statement is None:
            statement = scope.statement
        continues = ride is not None and (not isinstance(ride, Ride) or ride.prompt is None)
        wanted = enabled and statement is None and not continues
        saliency = self.plan.config.attention.saliency  # type: ignore[union-attr]
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
        sink = sink_for(self.steering)
        if sink is not None:
            sink.append(record)
        put_record(output, record)

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decoder: by now the tower has run; turn prompt, records and statement into this pass's biases."""
        if self.plan.eyes:
            collect_records(self.steering, None)
        ride = kwargs.get(STEERING)
        if ride is None:  # it was called by itself, or what was begun got lost on the way
            said, kwargs = take_statement(self.steering, kwargs)
            ride = self._begin(read_call(module, args, kwargs), said, last=True)
        if not isinstance(ride, Ride):  # nothing to steer, or a first pass that looks for it
            enter_pass(ride or UNSTEERED)
            return args, kwargs
        ride.arrived = True
        self._decide(ride, module, read_call(module, args, kwargs))
        enter_pass(ride)
        return args, {**kwargs, STEERING: ride}

    def _decide(self, ride: Ride, module: nn.Module, given: Given) -> None:
        """This pass's biases."""
        tokens: Tensor = given.ids if given.embeds is None else given.embeds
        (rows, queries), device, cache = tokens.shape[:2], tokens.device, given.cache
        past = past_of(cache)
        gates = None  # what they remember of this cache, before a prompt makes a new state for it
        if ride.state is not None and (ride.prompt is None or int(past)):
            gates = ride.state.for_rows(rows).gates
        if ride.prompt is not None:
            prompt, start = ride.prompt, int(past)

            def look() -> Tensor:
                return look_at_prompt(self.plan, prompt, given, rows=rows, past=start, prompt_end=ride.prompt_end)

            ride.state = resolve_state(ride, prompt, self.plan, rows=rows, past=start, device=device, look=look)
            tell_reader(self.steering, ride)
        if ride.state is None:
            raise PatchError("a forward pass of a patched model lost its steering state; please report this.")
        ride.state = ride.state.for_rows(rows)  # no-op but for a cache whose rows were repeated since
        if cache is None and (scope := scope_for(self.steering)) is not None:
            scope.state = ride.state
        if not ride.state.speaks:
            return
        facts = PassFacts(
            rows=rows, queries=queries, past=past if queries == 1 else int(past), device=device, cached=cache is not None,
            training=module.training and torch.is_grad_enabled(), tokens=ride.tokens, prompt=ride.prompt,
            prompt_end=ride.prompt_end, gates=gates, traced=trace_of(self.steering) is not None, watched=ride.watched,
        )  # fmt: skip
        ride.pace = pace(self.plan.config.attention, self.plan.patterns, facts)  # type: ignore[arg-type]
        strengths = strengths_for(self.steering, device)
        ride.biases = make_biases(ride.state, self.plan, strengths, cache=cache, queries=queries, gate=ride.pace.factor)

    def after_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Decoder: check the receipt; the keys are in the cache now, the caller's or its own, so the state goes there, too."""
        enter_pass(None)
        ride = kwargs.get(STEERING)
        if output is None or not isinstance(ride, Ride) or ride.state is None:  # interrupted, or nothing to steer
            return
        skips = module.training and skips_layers(module)
        check_receipt(ride, module, self.plan.anatomy.root, self.places, skips=skips)
        if not ride.watched and ride.pace is not None and ride.pace.before is not None:  # the root's hooks do not run
            gates = gates_after(ride.pace, self.plan.config.attention, None)  # type: ignore[arg-type]
            ride.state = dataclasses.replace(ride.state, gates=gates)
        given = read_call(module, args, kwargs).cache
        if given is not None:
            ride.state = write_state(given, ride.state)
        for cache in caches_in(output):
            if cache is not given:
                ride.state = write_state(cache, ride.state)

    def after_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Root and base model: the decoder must have got what was begun here."""
        ride = kwargs.get(STEERING)
        if isinstance(ride, Ride) and not ride.arrived:
            raise PatchError(
                "what steers this pass did not reach the decoder: something between the model and its decoder (a hook, a wrapper, "
                "a replaced decoder or forward) does not hand the keyword 'hf_steer' on. Let it pass **kwargs through, patch the "
                "model after such changes, or run inside disable_steering(model)."
            )

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Root: its logits are known; the gates of the next step come from them."""
        ride = kwargs.get(STEERING)
        if not isinstance(ride, Ride):
            return
        trace, attention = trace_of(self.steering), self.plan.config.attention
        remembers = self.plan.patterns is not None or (attention is not None and attention.gate is not None)
        if ride.state is None or not (remembers or trace is not None):
            return
        if ride.pace is None or ride.pace.before is None:
            return
        if self.plan.anatomy.root.get_output_embeddings() is None:
            raise PatchError(
                "think tags, gates and traces follow what a model says, and this one has no language-modelling head. Patch the "
                "model with its head (AutoModelForCausalLM, AutoModelForImageTextToText), or use queries='all' or 'generated'."
            )
        logits = logits_in(output)
        state = dataclasses.replace(ride.state, gates=gates_after(ride.pace, attention, logits))  # type: ignore[arg-type]
        for cache in caches_in(output):
            write_state(cache, state)
        if trace is not None:
            trace.add(ride.pace, mean_strength(strengths_for(self.steering, logits.device)), logits)

    def _begin(self, given: Given, said: Saliency | None, *, last: bool = False) -> Ride | None:
        """Start a ride for one forward pass, or none where nothing is to be steered; `last`: no other hook will ask."""
        refuse_other_implementation(self.plan, self.implementations)
        return begin_pass(self.steering, given, said, last=last)
