"""The submodule that a patched model carries: all edits, `generate`, saving and loading."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

from torch import nn

from hf_steer.errors import PatchError
from hf_steer.ground.arguments import Given, inferred_mask, read_generate
from hf_steer.ground.caches import past_of
from hf_steer.ground.implementations import CONTINUOUS_BATCHING
from hf_steer.patching.aligning.hooks import Aligners
from hf_steer.patching.aligning.passes import whole_prompt
from hf_steer.patching.edits import AddHook, AddLoadHook, AddSubmodule, SetAttentionFunction, SetAttribute
from hf_steer.patching.gaze.hooks import Gaze
from hf_steer.patching.gaze.learned import LearnedStrengths
from hf_steer.patching.gaze.ledger import close_ledger, refuse_unseen, warn_of_others
from hf_steer.patching.gaze.memory import read_state
from hf_steer.patching.gaze.runtime import read_prompt
from hf_steer.patching.planned import Plan
from hf_steer.patching.saves import CHECKPOINT_WEIGHTS_NAME, as_safetensors, write_steering
from hf_steer.patching.scopes import STEERING, GenerateScope, generate_scope, scope_for, statement_for, take_statement
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
from hf_steer.saliency import Saliency
from hf_steer.saving import whole_save

_LIVE: weakref.WeakSet[Steering] = weakref.WeakSet()
"""The steerings of this process that are in force."""
Edit = AddSubmodule | SetAttribute | SetAttentionFunction | AddHook | AddLoadHook


class Steering(nn.Module):
    """Plan, undo and parts of one patched model: its gaze, its aligners, what it learned."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.undo = ExitStack()
        self.overridden = {name: vars(plan.anatomy.root).get(name) for name in ("generate", "save_pretrained")}
        self.warned = False
        self.gaze = Gaze(plan, self)
        self.aligners = Aligners(plan, self)
        self.learned = LearnedStrengths(plan) if plan.config.learns_strength else None

    def release(self) -> None:
        """After unpatching: nothing here points back, so that model and steering are freed as soon as nobody holds them."""
        _LIVE.discard(self)
        self.gaze.owner, self.aligners.owner = (), ()

    def edits(self) -> Iterator[Edit]:
        """All that patching changes, in the order of change."""
        anatomy = self.plan.anatomy
        yield AddSubmodule(anatomy.root, STEERING, self)
        yield SetAttribute(anatomy.root, "save_pretrained", self.save_pretrained)
        yield SetAttribute(anatomy.root, "generate", self.generate)
        if self.plan.trains:
            yield AddLoadHook(anatomy.root, self.after_load)
        if self.plan.aligners:
            yield from self.aligners.edits()
        yield from self._gaze_edits()
        for module in {id(module): module for module in (anatomy.base, anatomy.root)}.values():
            yield AddHook(module, "before", self.before_any)

    def before_any(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Root and base model, before everything else: what no part of the steering could carry."""
        if getattr(module, "_is_replica", False) and statement_for(self)[0]:
            raise PatchError(
                "this is a replica that nn.DataParallel made of a patched model, and hooks of the original cannot steer it. Use "
                "one process per GPU: torchrun with DistributedDataParallel (accelerate and Trainer do that); or one visible GPU; "
                "or run inside disable_steering(model)."
            )
        if self.plan.strengths:
            return None
        _, kwargs = take_statement(self, kwargs)  # with strengths of 0 it changes nothing
        return args, kwargs

    def _gaze_edits(self) -> Iterator[Edit]:
        """Those that steer attention."""
        root = self.plan.anatomy.root
        if not self.plan.strengths:
            return
        for name in CONTINUOUS_BATCHING:
            if hasattr(root, name):
                yield SetAttribute(root, name, self.refuse_continuous_batching)
        yield from self.gaze.edits()

    def add_gaze(self, plan: Plan) -> None:
        """Steer attention, too, beside aligners that stay as they are; a failure leaves it undone."""
        before = self.plan, self.gaze, self.learned
        self.plan, self.gaze = plan, Gaze(plan, self)
        self.learned = LearnedStrengths(plan) if plan.config.learns_strength else None
        try:
            with ExitStack() as edits:
                self.gaze.register_functions()
                for edit in self._gaze_edits():
                    edits.enter_context(edit)
                self.undo.push(edits.pop_all())
        except BaseException:
            self.plan, self.gaze, self.learned = before
            raise

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with its prompt kept whole for the forward passes that it is taken apart into.

        `saliency=` says where to look in this call, whatever thread or pool it runs in.
        """
        said, kwargs = take_statement(self, kwargs)
        if not (self.plan.strengths or self.aligners.reads_text):
            return self._original("generate")(*args, **kwargs)
        given = read_generate(args, kwargs)
        mask = given.mask if given.mask is not None else inferred_mask(given, self.plan.anatomy.root)
        with whole_prompt(self.aligners, given.ids, mask) if self.aligners.reads_text and given.ids is not None else nullcontext():
            scope = self._scope(given.with_mask(mask), said)
            if scope is None:
                return self._original("generate")(*args, **kwargs)
            with generate_scope(self, scope):
                result = self._original("generate")(*args, **kwargs)
            if scope.asks and inspect.isgenerator(result):
                raise PatchError(
                    "this custom_generate gives a generator, whose passes run after generate has returned, when its prompt is no "
                    "longer known. Let it run to its end and return the tokens, or run inside disable_steering(model)."
                )
            close_ledger(scope)
            return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Out of a pickle, or a copy."""
        super().__setstate__(state)
        _LIVE.add(self)

    def refuse_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Its passes run in a thread of their own, on paged caches, where nothing that steers them would arrive."""
        raise PatchError(
            "this model steers attention, and continuous batching cannot carry that yet: its passes run in a thread of their own, "
            "where they would silently be unsteered. Use model.generate on a padded batch, each row with its own saliency, or "
            "hf_steer.unpatch_model(model) first."
        )

    def _scope(self, given: Given, said: Saliency | None) -> GenerateScope | None:
        """What the passes of a `generate` are to know; None where nothing is steered in them."""
        enabled, block = statement_for(self)
        if not self.plan.strengths or not enabled:
            return None
        outer = scope_for(self)
        if outer is not None and outer.drafts:
            return GenerateScope(None)
        statement = block if said is None else said
        if statement is None:
            warn_of_others(self)
        past = int(past_of(given.cache))
        prompt = read_prompt(given, self.plan, statement, past=past, whole=True)
        if prompt is None:
            return None
        state = read_state(given.cache)
        if unseen := past if state is None else state.unseen_among(past):
            known = None if prompt.ids is None or prompt.first_position else prompt.ids[:, :past]
            refuse_unseen(self.plan, statement, unseen, known)
        root = self.plan.anatomy.root
        sees = self.plan.sees and (prompt.ids is None or bool(prompt.spans))
        asks = statement is not None or sees or (state is not None and state.speaks)
        return GenerateScope(prompt, statement, block, past, asks, given.guides(root), given.drafts_for(root))

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


def note_in_force(steering: Steering) -> None:
    """Patching is done."""
    _LIVE.add(steering)


def owner_of(module: nn.Module) -> str | None:
    """Class of the patched model that a module is a part of; None where it is none."""
    roots = (steering.plan.anatomy.root for steering in tuple(_LIVE))
    holding = (root for root in roots if root is not module and any(own is module for own in root.modules()))
    return next((type(root).__name__ for root in holding), None)
