"""The submodule that a patched model carries: its hooks and parts, all edits, saving and loading."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn

from hf_steer.errors import PatchError
from hf_steer.ground.gguf import gguf_file_of, why_unwritable
from hf_steer.ground.implementations import CONTINUOUS_BATCHING
from hf_steer.ground.longform import SEGMENT, goes_by_stretches
from hf_steer.patching.edits import AddHook, AddLoadHook, AddSubmodule, SetAttentionFunction, SetAttribute
from hf_steer.patching.gaze.hooks import Gaze
from hf_steer.patching.gaze.learned import LearnedStrengths
from hf_steer.patching.planned import Plan
from hf_steer.patching.root import Root
from hf_steer.patching.saves import CHECKPOINT_WEIGHTS_NAME, as_safetensors, write_steering
from hf_steer.patching.scopes import STEERING
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

_LIVE: weakref.WeakSet[Steering] = weakref.WeakSet()
"""The steerings of this process that are in force."""
Edit = AddSubmodule | SetAttribute | SetAttentionFunction | AddHook | AddLoadHook


class Steering(Root):
    """What a patched model carries: its hooks and parts, all edits and their undo, saving and loading."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.undo = ExitStack()

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
        models = {id(module): module for module in (anatomy.base, anatomy.root)}.values()
        for module in models:  # where one of them is the decoder, its own hook has to find the pass that this one ends
            yield AddHook(module, "finally", self.after_model)
        yield from self._gaze_edits()
        for module in models:
            yield AddHook(module, "before", self.before_model)

    def _gaze_edits(self) -> Iterator[Edit]:
        """Those that steer attention."""
        root = self.plan.anatomy.root
        if not self.plan.strengths:
            return
        for name in CONTINUOUS_BATCHING:
            if hasattr(root, name):
                yield SetAttribute(root, name, self.refuse_continuous_batching)
        if self.gaze.crosses and goes_by_stretches(root):
            yield SetAttribute(root, SEGMENT, self.generate_stretch)
        yield from self.gaze.edits()

    def add_gaze(self, plan: Plan) -> None:
        """Steer attention, too, beside aligners that stay as they are; a failure leaves it undone."""
        before = self.plan, self.gaze, self.learned
        self.plan, self.gaze = plan, Gaze(plan, self)
        self.learned = LearnedStrengths(plan) if plan.config.learns_strength else None
        try:
            with ExitStack() as edits:
                self.gaze.functions.register()
                for edit in self._gaze_edits():
                    edits.enter_context(edit)
                self.undo.push(edits.pop_all())
        except BaseException:
            self.plan, self.gaze, self.learned = before
            raise

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

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """transformers' `save_pretrained`, with the steering beside the base model.

        A folder that is named as Trainer names its checkpoints, `checkpoint-<step>`, gets what is trained alone when the base is
        frozen: the base is where it came from. So does any folder when the weights are packed in a way that cannot be written; a
        warning says so.
        """
        push_to_hub = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", None)
        given = args[0] if args else kwargs.pop("state_dict", None)
        whole = self.plan.anatomy.root.state_dict() if given is None else given
        base = {name: value for name, value in whole.items() if not name.startswith(f"{STEERING}.")}
        checkpoint = is_checkpoint(self, save_directory)
        weights = gather_weights(self, given)
        trained = gather_checkpoint(self, given) if checkpoint else {}
        writes_base, original = not checkpoint or is_adapted(self), self.original("save_pretrained")
        packed = why_unwritable(self.plan.anatomy.root) if writes_base else None
        if packed is not None:
            writes_base = False
            _warn_of_packed(self.plan.anatomy.root, packed, save_directory)
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


def _warn_of_packed(root: Any, packed: str, directory: str | os.PathLike[str]) -> None:
    file, place = gguf_file_of(root), os.fspath(directory)
    named = f"gguf_file={os.path.basename(file)!r}, " if file else "quantization_config=..., "
    warnings.warn(
        f"the steering was saved in {place!r}, the base model's weights were not: they are packed by {packed}, which transformers "
        f"reads and cannot write. Load both with hf_steer.from_pretrained({root.name_or_path!r}, {named}steer_config={place!r})."
        + (" A model that was loaded that way has plain weights, which are saved, too." if file else ""),
        stacklevel=3,
    )


def note_in_force(steering: Steering) -> None:
    """Patching is done."""
    _LIVE.add(steering)


def owner_of(module: nn.Module) -> str | None:
    """Class of the patched model that a module is a part of; None where it is none."""
    roots = (steering.plan.anatomy.root for steering in tuple(_LIVE))
    holding = (root for root in roots if root is not module and any(own is module for own in root.modules()))
    return next((type(root).__name__ for root in holding), None)
