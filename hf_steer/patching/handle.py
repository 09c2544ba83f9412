"""The submodule that a patched model carries: all edits, `generate`, saving and loading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from hf_steer.patching.context import (
    STEERING,
    generate_scope,
    scope_for,
    statement_for,
)
from hf_steer.patching.edits import AddHook, AddLoadHook, AddSubmodule, SetAttentionFunction, SetAttribute
from hf_steer.patching.gaze import Gaze
from hf_steer.patching.insertion import Aligners
from hf_steer.patching.learned import LearnedStrengths
from hf_steer.patching.passes import whole_prompt
from hf_steer.patching.runtime import (
    read_prompt,
)
from hf_steer.patching.saves import CHECKPOINT_WEIGHTS_NAME, as_safetensors, write_steering
from hf_steer.patching.weights import (
    check_loaded,
    check_shapes,
    gather_checkpoint,
    gather_weights,
    is_adapted,
    is_checkpoint,
    is_first,
)
from hf_steer.patching.with_peft import teach_peft
from hf_steer.saving import whole_save
from hf_steer.values import Plan

Edit = AddSubmodule | SetAttribute | SetAttentionFunction | AddHook | AddLoadHook


class Steering(nn.Module):
    """Plan, undo and parts of one patched model: its gaze, its aligners, what it learned."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.undo = ExitStack()
        self.overridden = {name: vars(plan.anatomy.root).get(name) for name in ("generate", "save_pretrained")}
        self.gaze = Gaze(plan, self)
        self.aligners = Aligners(plan, self)
        self.learned = LearnedStrengths(plan) if plan.config.learns_strength else None

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
            yield from self.gaze.edits()

    def add_gaze(self, plan: Plan) -> None:
        """Steer attention, too, beside aligners that stay as they are; a failure leaves it undone."""
        before = self.plan, self.gaze, self.learned
        self.plan, self.gaze = plan, Gaze(plan, self)
        self.learned = LearnedStrengths(plan) if plan.config.learns_strength else None
        try:
            with ExitStack() as edits:
                if plan.strengths and not self.aligners.reads_text:
                    edits.enter_context(SetAttribute(plan.anatomy.root, "generate", self.generate))
                for edit in self.gaze.edits() if plan.strengths else ():
                    edits.enter_context(edit)
                self.undo.push(edits.pop_all())
        except BaseException:
            self.plan, self.gaze, self.learned = before
            raise

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

        A folder that is named as Trainer names its checkpoints, `checkpoint-<step>`, gets what is trained alone when the base is
        frozen: the base is where it came from.
        """
        push_to_hub = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", None)
        given = args[0] if args else kwargs.pop("state_dict", None)
        whole = self.plan.anatomy.root.state_dict() if given is None else given
        base = {name: value for name, value in whole.items() if not name.startswith(f"{STEERING}.")}
        checkpoint = is_checkpoint(self, save_directory)
        weights = gather_weights(self, given)
        trained = gather_checkpoint(self, given) if checkpoint else {}
        writes_base, original = not checkpoint or is_adapted(self), self._original("save_pretrained")
        if not (is_main_process and is_first()) or kwargs.get("distributed_checkpoint"):  # the others gather along
            if writes_base:
                original(save_directory, is_main_process and is_first(), base, *args[1:], **kwargs)
            writes_base = False
        if is_main_process and is_first():
            with whole_save(save_directory) as stage:
                if writes_base:
                    original(stage, True, base, *args[1:], **kwargs)
                if checkpoint:
                    (stage / CHECKPOINT_WEIGHTS_NAME).write_bytes(as_safetensors(trained))
                write_steering(self.plan.config, stage, weights)
        if push_to_hub:
            hub = {key: kwargs[key] for key in ("token", "private", "revision", "commit_message") if key in kwargs}
            self.plan.anatomy.root.push_to_hub(repo_id or os.path.basename(os.path.normpath(save_directory)), **hub)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write only the steering."""
        weights = gather_weights(self)
        if is_first():
            with whole_save(directory) as stage:
                write_steering(self.plan.config, stage, weights)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """torch's. PEFT's wrapper, which asks for all modules when it is made, learns on the way that there is more to save."""
        teach_peft()
        yield from super().named_modules(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Part of `load_state_dict`: weights of another shape are refused by name, before any of the steering's is copied."""
        check_shapes(self, {name: value for name, value in state_dict.items() if name.startswith(prefix)}, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def after_load(self, module: nn.Module, incompatible: Any) -> None:
        """Root: weights have been loaded; a checkpoint of the steering alone is complete."""
        check_loaded(self, incompatible)

    def _original(self, name: str) -> Any:
        """A method of the root model as it was before patching."""
        root = self.plan.anatomy.root
        return self.overridden[name] or getattr(type(root), name).__get__(root)

