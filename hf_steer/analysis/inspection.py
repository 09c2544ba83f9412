"""Where things are in a model that has not been loaded: from `config.json` alone, built without memory."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from hf_steer.analysis.described import describe, sites_of
from hf_steer.config import AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.errors import FileError, SteerError
from hf_steer.families import resolve
from hf_steer.ground.parts import Anatomy
from hf_steer.ground.survey import survey
from hf_steer.io import build_on_meta, read_base_config
from hf_steer.patching import make_plan
from hf_steer.registry import FAMILIES


@dataclass(frozen=True)
class Inspection:
    """What `hf-steer inspect` prints.

    Attributes:
        model: as asked for.
        model_type: of its `config.json`.
        architectures: likewise.
        can_be_patched: whether it takes a gaze or aligners.
        reason: why not, if not.
        gaze: `"self"`, `"cross"` or both with a comma between, where attention can be steered; None where it cannot.
        no_gaze: why not, if not.
        row: whether its type has a row in the families table; structure alone speaks otherwise.
        anatomy: parts by name: layers, heads, encoder, placeholder tokens; None where nothing could be looked at.
        sites: every attention that can be steered, one by one.
        steering: the configuration that lies beside it, if one does.
    """

    model: str
    model_type: str
    architectures: tuple[str, ...]
    can_be_patched: bool
    reason: str | None
    gaze: str | None
    no_gaze: str | None
    row: bool
    anatomy: dict[str, Any] | None
    sites: tuple[dict[str, Any], ...]
    steering: dict[str, Any] | None

    def __str__(self) -> str:
        said = "structure, and its row of the families table" if self.row else "structure alone"
        lines = [
            f"{self.model}",
            f"  type             {self.model_type} ({', '.join(self.architectures) or 'no architectures named'})",
            f"  can be patched   {'yes' if self.can_be_patched else 'no: ' + str(self.reason)}",
        ]
        if self.can_be_patched:
            lines += [f"  gaze             {self.gaze or 'no: ' + str(self.no_gaze)}", f"  found by         {said}"]
        lines += [f"  {name:<17}{_text(value)}" for name, value in (self.anatomy or {}).items()]
        beside = "none beside it"
        if self.steering is not None:
            aligners = [f"{a['kind']} at {a['modality']} {a['placement']}" for a in self.steering["aligners"]]
            beside = f"steer_config.json: attention {self.steering['attention']}, aligners {', '.join(aligners) or 'none'}"
        return "\n".join([*lines, f"  steering         {beside}"])


    def listed(self) -> str:
        """Every attention that can be steered, one a line."""
        wide = max((len(site["path"]) for site in self.sites), default=0)
        return "\n".join(
            f"  {site['attends']:<5}  layer {site['layer']:>3}  {site['path']:<{wide}}  {site['class']}, {site['heads']} query, "
            f"{site['key_value_heads']} key/value, by {site['carried']}"
            for site in self.sites
        )


def inspect_model(id_or_dir: str | os.PathLike[str], **hub_kwargs: Any) -> Inspection:
    """Look at a folder or a Hub repository without reading its weights.

    Args:
        id_or_dir: of the base model.
        **hub_kwargs: `revision`, `token`, `cache_dir`, ...

    Raises:
        FileError: no `config.json` that transformers can read.
    """
    config = read_base_config(id_or_dir, **hub_kwargs)
    anatomy, reason, no_gaze = None, None, None
    gazes: list[str] = []
    try:
        anatomy = resolve(build_on_meta(config))
        gazes, no_gaze = _gazes(anatomy)
        if not gazes and not anatomy.encoders:
            reason = no_gaze
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
        gaze=", ".join(gazes) or None,
        no_gaze=no_gaze,
        row=FAMILIES.look(config.model_type)[0] is not None,
        anatomy=None if anatomy is None else describe(anatomy),
        sites=() if anatomy is None else sites_of(anatomy),
        steering=steering,
    )


def _gazes(anatomy: Anatomy) -> tuple[list[str], str | None]:
    """What attention can be steered, and why not, where none can: as `patch_model` would say before it touches anything."""
    able: list[str] = []
    why: str | None = None
    wanted = [AttentionConfig(saliency=SaliencyConfig(source=None))]
    if anatomy.crosses:
        wanted.append(dataclasses.replace(wanted[0], attends="cross"))
    for attention in wanted:
        try:
            survey(make_plan(anatomy.root, SteerConfig(attention=attention)))
            able.append(attention.attends)
        except SteerError as error:
            why = why or str(error)
    return able, None if able else why


def _text(value: Any) -> str:
    return ", ".join(f"{name}: {token}" for name, token in value.items()) if isinstance(value, dict) else str(value)
