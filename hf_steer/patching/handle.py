"""The submodule that a patched model carries: all edits, `generate`, saving and loading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from hf_steer.config import TRAINABLE
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
from hf_steer.patching.weights import check_loaded, check_shapes, is_checkpoint, write_checkpoint, write_weights
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
            yield from self.gaze.edits()

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

    def _original(self, name: str) -> Any:
        """A method of the root model as it was before patching."""
        root = self.plan.anatomy.root
        return self.overridden[name] or getattr(type(root), name).__get__(root)

