"""The submodule that a patched model carries: its hooks are the only code of ours that runs inside the model's calls."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils.generic import ModelOutput

from hf_steer.attention import registered_name
from hf_steer.config import TRAINABLE
from hf_steer.errors import PatchError
from hf_steer.patching.context import (
    STEERING,
    GenerateScope,
    collect_records,
    generate_scope,
    named_arguments,
    scope_for,
    sink_for,
    statement_for,
)
from hf_steer.patching.edits import AddHook, AddLoadHook, AddSubmodule, SetAttentionFunction, SetAttribute
from hf_steer.patching.firstpass import look_at_prompt
from hf_steer.patching.insertion import Aligners
from hf_steer.patching.learned import LearnedStrengths
from hf_steer.patching.pacing import PassFacts, gates_after, pace
from hf_steer.patching.passes import whole_prompt
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
from hf_steer.patching.weights import check_loaded, check_shapes, is_checkpoint, write_checkpoint, write_weights
from hf_steer.saliency import EyeRecorder, record_with
from hf_steer.values import Plan

NEW_PICTURES = (*PIXELS.values(), "mm_encoder_outputs")

Edit = AddSubmodule | SetAttribute | SetAttentionFunction | AddHook | AddLoadHook


class Steering(nn.Module):
    """Plan, undo and hooks of one patched model; a call's own state rides on its arguments and on its cache."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.undo = ExitStack()
        self.overridden = {name: vars(plan.anatomy.root).get(name) for name in ("generate", "save_pretrained")}
        anatomy = plan.anatomy
        self.implementation = None if anatomy.decoder is None else implementation_of(anatomy.decoder.config)
        self.eyes_implementation = None if anatomy.tower is None else implementation_of(anatomy.tower.config)
        self.aligners = Aligners(plan, self)
        learns = plan.config.attention is not None and plan.config.attention.strength == TRAINABLE
        self.learned = LearnedStrengths(plan) if learns else None

    def edits(self) -> Iterator[Edit]:
        """All that patching changes, in the order of change."""
        anatomy = self.plan.anatomy
        yield AddSubmodule(anatomy.root, STEERING, self)
        yield SetAttribute(anatomy.root, "save_pretrained", self.save_pretrained)
        if self.plan.strengths or self.aligners.reads_text:
            yield SetAttribute(anatomy.root, "generate", self.generate)
        if self.plan.trains:
            yield AddLoadHook(anatomy.root, self.after_load)
        if self.plan.aligners:
            yield from self.aligners.edits()
        if self.plan.strengths:
            yield from self._attention_edits()

    def _attention_edits(self) -> Iterator[Edit]:
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
            collect_records(self, ride.records)  # a LLaVA hands no arguments of ours on to its tower
        return args, {**kwargs, STEERING: ride}

    def before_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Vision tower: let a recorder watch it when the model's own eyes are wanted."""
        ride = kwargs.pop(STEERING, None)
        enabled, statement = statement_for(self)
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
        sink = sink_for(self)
        if sink is not None:
            sink.append(record)
        if isinstance(output, ModelOutput):
            output.hf_steer = record

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decoder: by now the tower has run; turn prompt, records and statement into this pass's biases."""
        if self.plan.eyes:
            collect_records(self, None)
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
            tell_reader(self, ride)
        if ride.state is None:
            raise PatchError("a forward pass of a patched model lost its steering state; please report this.")
        ride.state = ride.state.for_rows(rows)  # no-op but for a cache whose rows were repeated since
        if cache is None and (scope := scope_for(self)) is not None:
            scope.state = ride.state
        if ride.state.speaks:
            facts = PassFacts(
                rows=rows, queries=queries, past=past if queries == 1 else int(past), device=device, cached=cache is not None,
                training=module.training and torch.is_grad_enabled(), tokens=ride.tokens, prompt=ride.prompt,
                prompt_end=ride.prompt_end, gates=gates, traced=trace_of(self) is not None, watched=ride.watched,
            )  # fmt: skip
            ride.pace = pace(self.plan.config.attention, self.plan.patterns, facts)  # type: ignore[arg-type]
            strengths = strengths_for(self, device)
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
        if ride is None or ride.state is None or ride.pace.before is None:
            return
        logits = output["logits"] if isinstance(output, ModelOutput) else next(value for value in output if value.ndim == 3)
        state = dataclasses.replace(ride.state, gates=gates_after(ride.pace, self.plan.config.attention, logits))  # type: ignore[arg-type]
        values = output.values() if isinstance(output, ModelOutput) else output
        for cache in (value for value in values if isinstance(value, Cache)):
            write_state(cache, state)
        trace = trace_of(self)
        if trace is not None:
            trace.add(ride.pace, mean_strength(strengths_for(self, logits.device)), logits)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with its prompt kept whole for the forward passes that it is taken apart into."""
        named = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        if named.get("inputs") is not None:
            named["input_ids"] = named["inputs"]
        if named.get("attention_mask") is None:
            named["attention_mask"] = self._inferred_mask(named)
        if self.aligners.reads_text and named.get("input_ids") is not None:
            with whole_prompt(self.aligners, named["input_ids"], named["attention_mask"]):
                return self._generate(named, args, kwargs)
        return self._generate(named, args, kwargs)

    def _generate(self, named: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        original = self._original("generate")
        if not self.plan.strengths:
            return original(*args, **kwargs)
        enabled, statement = statement_for(self)
        if not enabled:
            return original(*args, **kwargs)
        if scope_for(self) is not None:  # a draft by the same model: checked by the steered passes, not steered itself
            with generate_scope(self, None):
                return original(*args, **kwargs)
        cache = named.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        prompt = read_prompt(named, self.plan, statement, past=past, whole=True)
        if prompt is None:
            return original(*args, **kwargs)
        with generate_scope(self, prompt):
            return original(*args, **kwargs)

    def _inferred_mask(self, named: dict[str, Any]) -> Tensor | None:
        """The mask that `generate` makes when none is given: from the padding token, unless that also ends sequences."""
        settings = named.get("generation_config") or self.plan.anatomy.root.generation_config
        ids = named.get("input_ids")
        pad, end = (named.get(name, getattr(settings, name, None)) for name in ("pad_token_id", "eos_token_id"))
        if ids is None or pad is None or pad in (end if isinstance(end, (list, tuple)) else [end]):
            return None
        mask: Tensor = ids != pad
        return mask

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """transformers' `save_pretrained`, with the steering beside the base model.

        A folder that is named as Trainer names its checkpoints, `checkpoint-<step>`, gets the steering alone when all of the
        base is frozen: the base is where it came from.
        """
        push_to_hub = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", None)
        given = args[0] if args else kwargs.pop("state_dict", None)
        if is_checkpoint(self, save_directory):
            write_checkpoint(self, save_directory, given)
        else:
            whole = self.plan.anatomy.root.state_dict() if given is None else given
            base = {name: value for name, value in whole.items() if not name.startswith(f"{STEERING}.")}
            self._original("save_pretrained")(save_directory, is_main_process, base, *args[1:], **kwargs)
        if is_main_process:
            self.save(save_directory, given)
        if push_to_hub:
            hub = {key: kwargs[key] for key in ("token", "private", "revision", "commit_message") if key in kwargs}
            self.plan.anatomy.root.push_to_hub(repo_id or os.path.basename(os.path.normpath(save_directory)), **hub)

    def save(self, directory: str | os.PathLike[str], given: dict[str, Tensor] | None = None) -> None:
        """Write only the steering: weights first, so that a configuration never lies there without them."""
        write_weights(self, directory, given)
        self.plan.config.save_pretrained(directory)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Part of `load_state_dict`: weights of another shape are refused by name, before any of the steering's is copied."""
        check_shapes(self, {name: value for name, value in state_dict.items() if name.startswith(prefix)}, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def after_load(self, module: nn.Module, incompatible: Any) -> None:
        """Root: weights have been loaded; a checkpoint of the steering alone is complete."""
        check_loaded(self, incompatible)

    def _begin(self, named: dict[str, Any]) -> Ride | None:
        """Start a ride for one forward pass, or none where nothing is to be steered."""
        self._refuse_changed_implementation()
        enabled, statement = statement_for(self)
        if not enabled:
            return None
        cache, scope = named.get("past_key_values"), scope_for(self)
        state = read_state(cache)
        ids = named.get("input_ids")
        ride = Ride(backend=self.plan.config.attention.backend, state=state, statement=statement, tokens=ids)  # type: ignore[union-attr]
        if scope is not None:
            return self._begin_in_generate(ride, scope, named)
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, Tensor) and not torch.compiler.is_compiling():
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

    def _original(self, name: str) -> Any:
        """A method of the root model as it was before patching."""
        root = self.plan.anatomy.root
        return self.overridden[name] or getattr(type(root), name).__get__(root)

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
