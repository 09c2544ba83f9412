"""Where things are in a model that has not been loaded: from `config.json` alone, built without memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_steer.config import SteerConfig
from hf_steer.errors import FileError, SteerError
from hf_steer.families import resolve
from hf_steer.ground.parts import Anatomy, Site
from hf_steer.io import build_on_meta, read_base_config
from hf_steer.patching import make_plan


@dataclass(frozen=True)
class Inspection:
    """What `hf-steer inspect` prints.

    Attributes:
        model: as asked for.
        model_type: of its `config.json`.
        architectures: likewise.
        can_be_patched: whether its family is known and its attention can be steered.
        reason: why not, if not.
        anatomy: parts by name: layers, heads, encoder, placeholder tokens; None when the family is not known.
        steering: the configuration that lies beside it, if one does.
    """

    model: str
    model_type: str
    architectures: tuple[str, ...]
    can_be_patched: bool
    reason: str | None
    anatomy: dict[str, Any] | None
    steering: dict[str, Any] | None

    def __str__(self) -> str:
        lines = [
            f"{self.model}",
            f"  type             {self.model_type} ({', '.join(self.architectures) or 'no architectures named'})",
            f"  can be patched   {'yes' if self.can_be_patched else 'no: ' + str(self.reason)}",
        ]
        lines += [f"  {name:<17}{_text(value)}" for name, value in (self.anatomy or {}).items()]
        beside = "none beside it"
        if self.steering is not None:
            aligners = [f"{a['kind']} at {a['modality']} {a['placement']}" for a in self.steering["aligners"]]
            beside = f"steer_config.json: attention {self.steering['attention']}, aligners {', '.join(aligners) or 'none'}"
        return "\n".join([*lines, f"  steering         {beside}"])


def inspect_model(id_or_dir: str | os.PathLike[str], **hub_kwargs: Any) -> Inspection:
    """Look at a folder or a Hub repository without reading its weights.

    Args:
        id_or_dir: of the base model.
        **hub_kwargs: `revision`, `token`, `cache_dir`, ...

    Raises:
        FileError: no `config.json` that transformers can read.
    """
    config = read_base_config(id_or_dir, **hub_kwargs)
    anatomy, reason = None, None
    try:
        model = build_on_meta(config)
        anatomy = resolve(model)
        make_plan(model, SteerConfig())
    except SteerError as error:
        reason = str(error)
    try:
        steering = SteerConfig.from_pretrained(id_or_dir, **hub_kwargs).to_dict()
    except FileError:
        steering = None
    return Inspection(
        model=os.fspath(id_or_dir),
        model_type=config.model_type,
        architectures=tuple(config.architectures or ()),
        can_be_patched=reason is None,
        reason=reason,
        anatomy=None if anatomy is None else _describe(anatomy),
        steering=steering,
    )


def _describe(anatomy: Anatomy) -> dict[str, Any]:
    names = {module: name for name, module in anatomy.root.named_modules()}
    description: dict[str, Any] = {}
    if anatomy.decoder is not None:
        description["decoder"] = names[anatomy.decoder] or "(the model itself)"
        description["layers"] = f"{len(anatomy.layers)}: {_range(anatomy.layers)}"
        heads = f"{anatomy.num_heads} query, {anatomy.num_key_value_heads} key/value, of {anatomy.head_dim} features"
        description["heads per layer"] = heads
    for modality, encoder in anatomy.encoders.items():
        places = ["output", "layers", *(["projector"] if encoder.projector is not None else [])]
        description[f"{modality} encoder"] = names[encoder.tower] or "(the model itself)"
        description[f"{modality} layers"] = f"{len(encoder.layers)}: {_range(encoder.layers)}, of {encoder.layer_size} features"
        description[f"{modality} aligners"] = f"at {', '.join(places)}"
    if anatomy.tower is not None:
        description["vision tower"] = names[anatomy.tower]
        description["vision blocks"] = f"{len(anatomy.blocks)}: {_range(anatomy.blocks)}"
        description["vision tokens"] = dict(anatomy.placeholder_ids)
        description["patches a token"] = anatomy.merge_size**2
    return description


def _range(sites: Sequence[Site]) -> str:
    return sites[0].name if len(sites) == 1 else f"{sites[0].name} ... {sites[-1].name}"


def _text(value: Any) -> str:
    return ", ".join(f"{name}: {token}" for name, token in value.items()) if isinstance(value, dict) else str(value)
