"""PEFT's wrapper saves and loads in its own way, past the model that it wraps. It learns to do so for the steering, too.

Only what it is given and what it wraps is looked at: around a model that is not patched it does what it always did.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_steer.config import CONFIG_NAME
from hf_steer.errors import FileError
from hf_steer.files import find_file
from hf_steer.patching.saves import read_for, write_steering
from hf_steer.patching.scopes import find_steering
from hf_steer.patching.weights import gather_weights, is_first, load_weights, own_weights, root_names
from hf_steer.saving import finish_save, whole_save

_HUB_KEYS = ("token", "cache_dir", "local_files_only", "revision", "subfolder")
_CARD, _ADAPTER = "README.md", "adapter_config.json"
STEERED = "saves_steering"
"""Marks PEFT's class once it knows; it has one for all models, and others may wrap its methods after us."""


def teach_peft() -> None:
    """Once PEFT is there: its `save_pretrained` writes, and its `load_adapter` reads, the steering beside the adapter."""
    wrapper: Any = getattr(sys.modules.get("peft"), "PeftModel", None)
    if wrapper is not None and STEERED not in vars(wrapper):
        setattr(wrapper, STEERED, True)
        wrapper.save_pretrained = _saving(wrapper.save_pretrained)
        wrapper.load_adapter = _loading(wrapper.load_adapter)


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        steering = find_steering(self)
        if steering is None or not own_weights(steering):
            return original(self, save_directory, *args, **kwargs)
        weights = gather_weights(steering, _given(steering, kwargs.get("state_dict")))
        main = signature.bind(self, save_directory, *args, **kwargs).arguments.get("is_main_process", True)
        if not main or not is_first():
            return original(self, save_directory, *args, **kwargs)
        with whole_save(save_directory) as stage:
            card = Path(save_directory, _CARD)
            if card.is_file():  # PEFT writes into the one that is there
                shutil.copyfile(card, stage / _CARD)
            original(self, str(stage), *args, **kwargs)
            for folder in {stage, *(path.parent for path in stage.rglob(_ADAPTER))}:  # all but `default` have their own
                write_steering(steering.plan.config, folder, weights)

    return save_pretrained


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        steering = find_steering(self)
        hub = {key: kwargs[key] for key in _HUB_KEYS if key in kwargs}
        place = None if steering is None else _beside(model_id, hub, bool(own_weights(steering)))
        weights = {} if place is None else read_for(steering, place, **hub)  # every check before the adapter is loaded
        result = original(self, model_id, *args, **kwargs)
        if weights and place is not None:
            load_weights(steering, weights, place)
        return result

    return load_adapter


def _given(steering: Any, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Weights by their names in the root model, out of those of the wrapper; None where ours are not among them."""
    if state is None:
        return None
    found = {
        name: state[f"{prefix}{name}"]
        for name in root_names(steering).values()
        for prefix in ("base_model.model.", "base_model.", "")
        if f"{prefix}{name}" in state
    }
    return found if len(found) == len(root_names(steering)) else None


def _beside(model_id: Any, hub: dict[str, Any], needed: bool) -> Any:
    """Where the steering of an adapter is; None if nowhere.

    Raises:
        FileError: a checkpoint of Trainer that has none, for a model that would go on from fresh aligners.
    """
    local = os.path.isdir(model_id)
    if local:
        for folder in (model_id, os.path.dirname(os.path.abspath(model_id))):
            finish_save(folder)
    try:
        find_file(model_id, CONFIG_NAME, **hub)
        return model_id
    except FileError:
        pass
    if needed and local and os.path.isfile(os.path.join(model_id, "trainer_state.json")):
        raise FileError(
            f"{os.fspath(model_id)} is a checkpoint with an adapter and without a steering, so that the aligners of this model "
            "would go on untrained. Resume from one that was saved while the model was patched, or unpatch the model first."
        )
    return None
