"""A steering on disk: `steer_config.json`, and its weights in a safetensors file of a sub-folder.

The configuration notes the sha256 of its weights, so that those of another save are never taken for its own. Where the base is
saved along, `config.json` gets `model_type` as its first key. transformers, which sorts the keys, loads that like any other; but
once it has written another model into the folder, the keys are in order again, and the steering beside them is known to be stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hf_steer.config import CONFIG_NAME, SteerConfig
from hf_steer.config.record import Record
from hf_steer.config.steer import read_config
from hf_steer.errors import ConfigError, FileError
from hf_steer.files import find_file
from hf_steer.patching.weights import check_fit, check_values, load_weights, own_weights
from hf_steer.saving import GONE, place_of

WEIGHTS_NAME = "hf_steer/steer_model.safetensors"
"""In a folder of its own: some servers load every safetensors file that lies beside a model."""
CHECKPOINT_WEIGHTS_NAME = "model.safetensors"
BASE_CONFIG_NAME = "config.json"
_FRESH = "To start with fresh ones, give the configuration itself: steer_config=SteerConfig.from_pretrained(...)."


class Save(NamedTuple):
    """What `read_save` finds."""

    config: SteerConfig
    record: Record | None
    weights: dict[str, Tensor]


def write_steering(config: SteerConfig, stage: Path, weights: Mapping[str, Tensor]) -> None:
    """Stage a configuration and its weights, and note what belongs together."""
    path, digest = stage / WEIGHTS_NAME, None
    path.parent.mkdir(exist_ok=True)
    if weights:
        content = as_safetensors(weights)
        digest = hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
    else:
        path.with_name(path.name + GONE).touch()
    (stage / CONFIG_NAME).write_bytes(config.to_file(Record(digest, base=_mark_base(stage))))


def as_safetensors(weights: Mapping[str, Tensor]) -> bytes:
    # no further metadata: the file's hash would change from run to run
    return safetensors.torch.save({name: value.contiguous() for name, value in weights.items()}, {"format": "pt"})


def _mark_base(stage: Path) -> bool:
    """Put `model_type` first in the base's `config.json`; whether there is one."""
    path = stage / BASE_CONFIG_NAME
    if not path.is_file():
        return False
    values = json.loads(path.read_text(encoding="utf-8"))
    values = {"model_type": values.pop("model_type"), **values}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return True


def is_stale(record: Record | None, id_or_dir: str | os.PathLike[str], **hub_kwargs: Any) -> bool:
    """Whether a steering was saved with its base, and transformers has written another one into that folder since."""
    if record is None or not record.base:
        return False
    keys = list(json.loads(Path(find_file(id_or_dir, BASE_CONFIG_NAME, **hub_kwargs)).read_text(encoding="utf-8")))
    return keys == sorted(keys)


def read_save(id_or_dir: str | os.PathLike[str], needed: Mapping[str, Tensor] | None = None, **hub_kwargs: Any) -> Save:
    """Configuration and weights of one save.

    Args:
        id_or_dir: a folder, or a Hub repository.
        needed: what the weights are for, by name, on any device; shapes are compared before the weights are read.
        **hub_kwargs: as for `SteerConfig.from_pretrained`.

    Raises:
        FileError: a part that is missing, cannot be read, does not fit, or is of another save.
    """
    config, record, path = read_config(id_or_dir, **hub_kwargs)
    tries = 3
    while True:
        try:
            return Save(config, record, _weights_of(config, record, path, id_or_dir, needed, hub_kwargs))
        except FileError:
            config, noted, path = read_config(id_or_dir, **hub_kwargs)
            tries = tries - 1 if noted == record else 3  # someone may be saving: as long as it changes, and then for good
            if not tries:
                raise
            record = noted


def load_save(steering: Any, id_or_dir: str | os.PathLike[str], **hub_kwargs: Any) -> None:
    """Load the weights of a save into a steering, all of them or none; the errors of `load_steering`."""
    weights = read_for(steering, id_or_dir, **hub_kwargs)
    if weights:
        load_weights(steering, weights, id_or_dir)


def read_for(steering: Any, id_or_dir: str | os.PathLike[str], **hub_kwargs: Any) -> dict[str, Tensor]:
    """The weights of a save, if they are for this steering."""
    saved = read_config(id_or_dir, **hub_kwargs)[0]
    family = steering.plan.anatomy.family
    if saved.base_model_type not in (None, family):
        raise ConfigError(f"the steering in {os.fspath(id_or_dir)!r} is for {saved.base_model_type!r}; this model is {family!r}.")
    kinds = [[(a.modality, a.placement, a.kind) for a in config.aligners] for config in (saved, steering.plan.config)]
    if kinds[0] != kinds[1]:
        raise FileError(
            f"the steering in {os.fspath(id_or_dir)!r} has aligners {kinds[0]}; this model was patched with {kinds[1]}. Patch "
            "with SteerConfig.from_pretrained of that folder."
        )
    own = own_weights(steering)
    return read_save(id_or_dir, own, **hub_kwargs).weights if own else {}


def _weights_of(
    config: SteerConfig, record: Record | None, config_path: str, id_or_dir: str | os.PathLike[str],
    needed: Mapping[str, Tensor] | None, hub_kwargs: Mapping[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    local = os.path.isdir(id_or_dir)
    if not config.has_weights:
        if record is None and local and place_of(Path(config_path).parent, WEIGHTS_NAME) is not None:
            raise FileError(
                f"{WEIGHTS_NAME} lies beside {config_path}, which names nothing that it would be for: it is of another save, or "
                "the configuration lost its aligners. Save both again, or delete the weights."
            )
        return {}
    if record is not None and record.weights is None:
        raise FileError(
            f"{config_path} describes trained parts and was saved by itself, without their weights; {WEIGHTS_NAME}, if it is "
            f"there, is of another save. hf_steer.save_steering saves both. {_FRESH}"
        )
    revision = None if local else re.search(r"snapshots[/\\]([^/\\]+)", config_path)
    hub = hub_kwargs if revision is None else {**hub_kwargs, "revision": revision[1]}  # both from one commit
    try:
        path = find_file(id_or_dir, WEIGHTS_NAME, **hub)
    except FileError as error:
        told = f"Its {CONFIG_NAME} describes trained parts, whose weights are in {WEIGHTS_NAME}."
        raise FileError(f"{error} {told} {_FRESH}") from error
    return read_weights(path, needed, None if record is None else record.weights)


def read_weights(
    path: str | os.PathLike[str], needed: Mapping[str, Tensor] | None = None, digest: str | None = None
) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
        FileError: a file that cannot be read, has other tensors than are needed, is another one than was noted, or holds whole
            numbers, infinity or NaN.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        if needed is not None:
            check_fit(needed, shapes, path)
        content = Path(path).read_bytes()
        weights: dict[str, Tensor] = safetensors.torch.load(content)
    except (SafetensorError, OSError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{os.fspath(path)} cannot be read ({error}); it is truncated or foreign. Save it again.") from error
    found = hashlib.sha256(content).hexdigest()
    if digest not in (None, found):
        raise FileError(
            f"{os.fspath(path)} is not the file that was saved with the {CONFIG_NAME} beside it (its sha256 is {found[:12]}..., "
            f"noted is {str(digest)[:12]}...): the two are of different saves, or one was changed. Take both from one save."
        )
    check_values(weights, path)
    return weights
