"""The gaze's hooks: from a prompt, what the tower saw and what the user says to the bias of every steered layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils.generic import ModelOutput

from hf_steer.attention import registered_name
from hf_steer.errors import PatchError
from hf_steer.patching.context import (
    STEERING,
    GenerateScope,
    collect_records,
    named_arguments,
    scope_for,
    sink_for,
    statement_for,
)
from hf_steer.patching.edits import AddHook, SetAttentionFunction
from hf_steer.patching.firstpass import look_at_prompt
from hf_steer.patching.pacing import PassFacts, gates_after, pace
from hf_steer.patching.plan import implementation_of
from hf_steer.patching.reading import tell_reader
from hf_steer.patching.runtime import (
    PIXELS,
    Ride,
    count_tokens,
    make_biases,
    read_prompt,
    repeats_prompt,
    resolve_state,
)
from hf_steer.patching.state import read_state, write_state
from hf_steer.patching.strength import strengths_for
from hf_steer.patching.trace import mean_strength, trace_of
from hf_steer.saliency import EyeRecorder, record_with
from hf_steer.values import Plan

NEW_PICTURES = (*PIXELS.values(), "mm_encoder_outputs")


class Gaze(nn.Module):
    """The hooks that steer attention; a call's own state rides on its arguments and on its cache."""

    def __init__(self, plan: Plan, owner: nn.Module) -> None:
        super().__init__()
        self.plan = plan
        self.owner = (owner,)  # in a tuple, so that it does not become a submodule of its own submodule
        anatomy = plan.anatomy
        self.implementation = None if anatomy.decoder is None else implementation_of(anatomy.decoder.config)
        self.eyes_implementation = None if anatomy.tower is None else implementation_of(anatomy.tower.config)

    @property
    def steering(self) -> Any:
        """What holds for a stretch of the caller's code is kept under the steering."""
        return self.owner[0]

    def edits(self) -> Iterator[SetAttentionFunction | AddHook]:
        """All that the gaze changes, in the order of change."""
        anatomy = self.plan.anatomy
        for site in anatomy.layers:
            if site.index in self.plan.strengths or site.index in self.plan.readers:
                yield SetAttentionFunction(site.module, registered_name(str(self.implementation), "gaze", anatomy.family))
        for site in self.plan.eyes:
            name = registered_name(str(self.eyes_implementation), "eyes", anatomy.tower.config.model_type)
            yield SetAttentionFunction(site.module, name)
        if self.plan.eyes:
            yield AddHook(anatomy.tower, "before", self.before_tower)
            yield AddHook(anatomy.tower, "finally", self.after_tower)
        yield AddHook(anatomy.decoder, "before", self.before_decoder)
        yield AddHook(anatomy.decoder, "after", self.after_decoder)
        yield AddHook(anatomy.root, "after", self.after_model)
        for module in {id(module): module for module in (anatomy.base, anatomy.root)}.values():
            yield AddHook(module, "before", self.before_model)

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Root and base model: read the prompt, which the decoder no longer sees. PEFT calls only the base model."""
        if STEERING in kwargs:
            return None
        named = named_arguments(module, args, kwargs)
        ride = self._begin(named)
        if ride is None:
            return None
        ride.watched = module is self.plan.anatomy.root
        if self.plan.eyes and ride.prompt is not None:
            collect_records(self.steering, ride.records)  # a LLaVA hands no arguments of ours on to its tower
        return args, {**kwargs, STEERING: ride}

    def before_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Vision tower: let a recorder watch it when the model's own eyes are wanted."""
        ride = kwargs.pop(STEERING, None)
        enabled, statement = statement_for(self.steering)
        continues = ride is not None and ride.prompt is None
        wanted = enabled and statement is None and not continues
        record_with(EyeRecorder(self.plan.config.attention.saliency.source) if wanted else None)  # type: ignore[union-attr,arg-type]
        return args, kwargs

    def after_tower(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Vision tower: leave the record on its output, which travels to the decoder even when the caller encodes first."""
        recorder, anatomy = record_with(None), self.plan.anatomy
        if recorder is None or output is None:  # not wanted, or interrupted
            return
        if anatomy.arrangement is None:
            window = (module.window_size, module.patch_size) if anatomy.windowed else None
            grid = named_arguments(module, args, kwargs)["grid_thw"]
            record = recorder.tokens(grid, merge_size=anatomy.merge_size, window=window)
        else:
            record = recorder.pictures()
        sink = sink_for(self.steering)
        if sink is not None:
            sink.append(record)
        if isinstance(output, ModelOutput):
            output.hf_steer = record

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decoder: by now the tower has run; turn prompt, records and statement into this pass's biases."""
        if self.plan.eyes:
            collect_records(self.steering, None)
        named = named_arguments(module, args, kwargs)
        ride = kwargs.get(STEERING) or self._begin(named)
        if not isinstance(ride, Ride):  # nothing to steer, or a first pass that looks for it
            return None
        tokens: Tensor = named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"]
        (rows, queries), device = tokens.shape[:2], tokens.device
        cache = named.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        gates = None  # what they remember of this cache, before a prompt makes a new state for it
        if ride.state is not None and (ride.prompt is None or int(past)):
            gates = ride.state.for_rows(rows).gates
        if ride.prompt is not None:
            prompt, start = ride.prompt, int(past)

            def look() -> Tensor:
                return look_at_prompt(self.plan, prompt, named, rows=rows, past=start, prompt_end=ride.prompt_end)

            ride.state = resolve_state(ride, prompt, self.plan, rows=rows, past=start, device=device, look=look)
            tell_reader(self.steering, ride)
        if ride.state is None:
            raise PatchError("a forward pass of a patched model lost its steering state; please report this.")
        ride.state = ride.state.for_rows(rows)  # no-op but for a cache whose rows were repeated since
        if cache is None and (scope := scope_for(self.steering)) is not None:
            scope.state = ride.state
        if ride.state.speaks:
            facts = PassFacts(
                rows=rows, queries=queries, past=past if queries == 1 else int(past), device=device, cached=cache is not None,
                training=module.training and torch.is_grad_enabled(), tokens=ride.tokens, prompt=ride.prompt,
                prompt_end=ride.prompt_end, gates=gates, traced=trace_of(self.steering) is not None, watched=ride.watched,
            )  # fmt: skip
            ride.pace = pace(self.plan.config.attention, self.plan.patterns, facts)  # type: ignore[arg-type]
            strengths = strengths_for(self.steering, device)
            ride.biases = make_biases(ride.state, self.plan, strengths, cache=cache, queries=queries, gate=ride.pace.factor)
        return args, {**kwargs, STEERING: ride}

    def after_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Decoder: now that the keys are in the cache, the caller's or its own, the state goes there, too."""
        ride = kwargs.get(STEERING)
        if not isinstance(ride, Ride) or ride.state is None:
            return
        values = output.values() if isinstance(output, ModelOutput) else output
        for cache in (value for value in values if isinstance(value, Cache) and read_state(value) is not ride.state):
            write_state(cache, ride.state)

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Root: its logits are known; the gates of the next step come from them."""
        ride = kwargs.get(STEERING)
        trace, attention = trace_of(self.steering), self.plan.config.attention
        remembers = self.plan.patterns is not None or (attention is not None and attention.gate is not None)
        if ride is None or ride.state is None or not (remembers or trace is not None):
            return
        if ride.pace is None or ride.pace.before is None:
            return
        if self.plan.anatomy.root.get_output_embeddings() is None:
            raise PatchError(
                "think tags, gates and traces follow what a model says, and this one has no language-modelling head. Patch the "
                "model with its head (AutoModelForCausalLM, AutoModelForImageTextToText), or use queries='all' or 'generated'."
            )
        logits = output["logits"] if isinstance(output, ModelOutput) else next(value for value in output if value.ndim == 3)
        state = dataclasses.replace(ride.state, gates=gates_after(ride.pace, attention, logits))  # type: ignore[arg-type]
        values = output.values() if isinstance(output, ModelOutput) else output
        for cache in (value for value in values if isinstance(value, Cache)):
            write_state(cache, state)
        if trace is not None:
            trace.add(ride.pace, mean_strength(strengths_for(self.steering, logits.device)), logits)

    def _begin(self, named: dict[str, Any]) -> Ride | None:
        """Start a ride for one forward pass, or none where nothing is to be steered."""
        self._refuse_changed_implementation()
        enabled, statement = statement_for(self.steering)
        if not enabled:
            return None
        cache, scope = named.get("past_key_values"), scope_for(self.steering)
        state = read_state(cache)
        ids = named.get("input_ids")
        ride = Ride(backend=self.plan.config.attention.backend, state=state, statement=statement, tokens=ids)  # type: ignore[union-attr]
        if scope is not None:
            return self._begin_in_generate(ride, scope, named)
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, Tensor) and count_tokens(named) > 1 and not torch.compiler.is_compiling():
            past = int(past)
        if self._continues(ride, named, past):
            return ride
        ride.prompt = read_prompt(named, self.plan, statement, past=int(past), whole=False)
        return None if ride.prompt is None else ride

    def _begin_in_generate(self, ride: Ride, scope: GenerateScope, named: dict[str, Any]) -> Ride | None:
        """The first pass of a `generate` gets its prompt, later ones go on; others, such as guidance's, are not steered."""
        prompt, cache = scope.prompt, named.get("past_key_values")
        if prompt is None:
            return None
        ride.prompt_end = prompt.first_position + prompt.shape[1]
        if not scope.started:
            scope.started = True
            ride.prompt, ride.records = prompt, scope.records
            return ride
        if cache is None:
            ride.state = scope.state if repeats_prompt(named, prompt) else None
        return None if ride.state is None else ride

    def _continues(self, ride: Ride, named: dict[str, Any], past: int | Tensor) -> bool:
        """More text on a cache that has its state, and nothing new to see or said: no look at the tokens is needed."""
        state, count = ride.state, count_tokens(named)
        if state is None or any(named.get(name) is not None for name in NEW_PICTURES):
            return False
        if isinstance(past, int):
            if past == 0:
                return False
            state = ride.state = state.until(past)
        if ride.statement is not None:
            # token scores speak of the prompt that they were first used with
            given = ride.statement.tokens
            return ride.statement is state.statement and (count == 1 or (given is not None and given.shape[1] != past + count))
        return count == 1

    def _refuse_changed_implementation(self) -> None:
        anatomy = self.plan.anatomy
        now = implementation_of(anatomy.decoder.config)
        eyes_now = None if anatomy.tower is None else implementation_of(anatomy.tower.config)
        if (now, eyes_now) != (self.implementation, self.eyes_implementation):
            raise PatchError(
                f"the attention implementation was {self.implementation!r} when this model was patched and is {now!r} now "
                f"(vision tower: {self.eyes_implementation!r}, now {eyes_now!r}). Set it before patching: "
                "unpatch_model(model); model.set_attn_implementation(...); patch_model(model, config)."
            )
