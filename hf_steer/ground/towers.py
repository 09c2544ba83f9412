"""A model's eye and ear, and where aligners can be put: found by structure, where no row of the families table says it.

What the model's own `get_image_features` (or `get_audio_features`, or `forward`) calls, and what of it reads what, tells the tower
and what maps its features into the language model's space (`ground/ways.py`); the weights there tell their size
(`ground/widths.py`). Nothing is run or allocated.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from hf_steer.ground.alike import exchanged, shape_of
from hf_steer.ground.arguments import spelling_in
from hf_steer.ground.flow import Call, follow
from hf_steer.ground.parts import Encoder, Site
from hf_steer.ground.settings import has_setting, placeholder_of, setting
from hf_steer.ground.stacks import Stack, stack_in
from hf_steer.ground.ways import HEARD, Reader, Way, way_of
from hf_steer.ground.widths import argument_name, is_norm, width_into

PLACEHOLDERS: Mapping[str, tuple[str, ...]] = MappingProxyType({"image": ("image", "video"), "audio": ("audio",)})
"""Modality -> those of `values.MODALITIES` whose tokens its features replace."""
PLACEMENTS = ("output", "layers", "projector")
LAST_STATE = ("last_hidden_state", "0")
"""The field that hooks on a tower's output steer."""


@dataclass(frozen=True)
class Found:
    """The encoders of one model, and why it has none for the other modalities."""

    encoders: Mapping[str, Encoder]
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class _Place:
    """Where features are steered: a module, whether they are its input and in which argument, their size; or why nowhere."""

    outlet: nn.Module
    reads: bool = False
    size: int = 0
    argument: str = ""
    fault: str = ""
    channels_first: bool = False


FOUND: dict[Hashable, Mapping[str, Encoder | str]] = {}
"""Shape of a model and modality -> its encoder, with paths in place of modules, or why there is none; `MOST` of them at most."""
MOST = 32


def find_encoders(
    model: Any, modalities: Sequence[str] = ("image", "audio"), names: Mapping[nn.Module, str] | None = None
) -> Found:
    """The eye and the ear of a model; looked for once for all models that are alike.

    Args:
        model: a transformers model, on any device (meta included); nothing of it is changed or run.
        modalities: those that are wanted.
        names: of its modules, where they are known.

    Returns:
        What was found, and for each other modality why nothing was, in words.
    """
    names = {module: name for name, module in model.named_modules()} if names is None else names
    shape = shape_of(model, names)
    known = None if shape is None else FOUND.get((shape, tuple(modalities)))
    if known is None:
        new = {modality: _encoder(model, names, modality) for modality in modalities}
        known = {modality: own if isinstance(own, str) else exchanged(own, names) for modality, own in new.items()}
        if shape is not None:
            FOUND[shape, tuple(modalities)] = known
            for oldest in list(FOUND)[:-MOST]:
                FOUND.pop(oldest, None)
    parts = {name: module for module, name in names.items()}
    found = {modality: own if isinstance(own, str) else exchanged(own, parts) for modality, own in known.items()}
    return Found(
        {modality: own for modality, own in found.items() if isinstance(own, Encoder)},
        {modality: own for modality, own in found.items() if isinstance(own, str)},
    )


def _encoder(model: Any, names: Mapping[nn.Module, str], modality: str) -> Encoder | str:
    way = way_of(model, modality)
    if isinstance(way, str):
        return way
    tower, ids, states = way.tower, _placeholders(way.owner, model, modality), _states_read(model)
    stack = Stack() if way.fault else stack_in(tower, states)
    if way.fault:
        place, projectors = _Place(tower, fault=way.fault), ()
    elif way.readers:
        place = _before(way, way.readers[0], stack, max(1, len(states)))
        projectors = tuple(way.owner.get_submodule(part) for part in way.projectors)
    else:
        chain = _mapping(tower, stack) if ids else []
        projectors = tuple(own for own in (tower.get_submodule(call.part) for call in chain) if not is_norm(own))
        place = _within(tower, chain, stack) if projectors else _Place(tower, size=_handed_on(tower, stack))
    lacks = _lacks(model, modality, stack, place, ids)
    if len(lacks) == len(PLACEMENTS):
        return "; ".join(dict.fromkeys(lacks.values()))
    return Encoder(
        tower=tower,
        layers=tuple(Site(names[layer], layer, index) for index, layer in enumerate(stack.layers)),
        outlet=place.outlet,
        reads=place.reads,
        size=place.size,
        layer_size=stack.size,
        projector=projectors[0] if projectors else None,
        placeholder_ids=ids,
        mask=_mask(model, modality, ids),
        projectors=projectors,
        argument=place.argument,
        lacks=lacks,
        channels_first=place.channels_first,
    )


def _lacks(model: Any, modality: str, stack: Stack, place: _Place, ids: tuple[int, ...]) -> dict[str, str]:
    """Placements that this encoder does not have, and why."""
    kind, lacks = type(model).__name__, {}
    if not stack.layers:
        lacks["layers"] = place.fault or "it has no list of equal layers whose features are the last dimension"
    if not ids:
        lacks["projector"] = f"{kind} has no placeholder tokens that {HEARD[modality]} would replace among the text"
    if place.fault or not place.size:
        lacks["output"] = place.fault or "the size of what it hands on is not to be told from its weights"
    return lacks


def _before(way: Way, reader: Reader, stack: Stack, states: int) -> _Place:
    """Where something outside the tower reads what it gives: there, or at the tower's end where it is regrouped in between."""
    outlet = way.owner.get_submodule(reader.part)
    width = width_into(outlet, reader.argument)
    handed = _handed_on(way.tower, stack)
    if width is not None and not width.last:
        if width.reshaped or reader.reshaped:
            return _Place(outlet, fault=f"{type(outlet).__name__} reads features that are not the last dimension")
        return _Place(outlet, True, width.size, argument_name(outlet, reader.argument) or "", channels_first=True)
    if reader.reshaped and reader.fields <= set(LAST_STATE) and handed:
        return _Place(way.tower, size=handed)
    if isinstance(outlet, nn.ModuleList):
        return _Place(outlet, fault=f"several modules ({reader.part}) read several of its states")
    size = width.size if width is not None and not width.reshaped else stack.size * states
    return _Place(outlet, True, size, argument_name(outlet, reader.argument) or "")


def _within(tower: Any, chain: Sequence[Call], stack: Stack) -> _Place:
    """Where the tower itself maps what its layers give."""
    outlet, (at, _) = tower.get_submodule(chain[0].part), _read(chain[0], tower, stack)
    width = width_into(outlet, at)
    size = stack.size if width is None or width.reshaped or not width.last else width.size
    return _Place(outlet, True, size, argument_name(outlet, at) or "")


def _handed_on(tower: Any, stack: Stack) -> int:
    """Size of a tower's last state: that of its layers, unless it maps what they give; 0 where that is not known."""
    last = follow(tower, "forward").fields.get("last_hidden_state")
    mapping = [call.part for call in _mapping(tower, stack) if not is_norm(tower.get_submodule(call.part))]
    return 0 if last is not None and {came.part for came in last} & set(mapping) else stack.size


def _holder(tower: Any, stack: Stack) -> str:
    """The part that a tower's own method calls for its layers."""
    calls = reversed(follow(tower, "forward").calls)
    return next((call.part for call in calls if stack.path and f"{stack.path}.".startswith(f"{call.part}.")), "")


def _read(call: Call, tower: Any, stack: Stack) -> tuple[int | str, Any]:
    found = call.reads(_holder(tower, stack))
    return (0, None) if found is None else found


def _mapping(tower: Any, stack: Stack) -> list[Call]:
    """The calls of a tower from the one that reads its layers to the last one of all."""
    holder = _holder(tower, stack)
    after: dict[str, Call] = {}
    for call in follow(tower, "forward").calls if holder else ():
        if call.part != holder and (call.parts & {holder, *after}):
            after.setdefault(call.part, call)
    if not after:
        return []
    chain = [list(after.values())[-1]]
    while chain[0].reads(holder) is None:
        before = next((after[part] for part in sorted(chain[0].parts) if part in after and after[part] not in chain), None)
        if before is None:
            return []
        chain.insert(0, before)
    return chain


def _placeholders(owner: Any, model: Any, modality: str) -> tuple[int, ...]:
    for config in (getattr(owner, "config", None), *_configs(model)):
        words = [word for word in PLACEHOLDERS[modality] if config is not None and has_setting(config, f"{word}_token")]
        if words:
            return tuple(dict.fromkeys(placeholder_of(config, word) for word in words))
    return ()


def _configs(model: Any) -> list[Any]:
    """A model's configuration, and those of its parts."""
    return [model.config, *(own for own in vars(model.config).values() if hasattr(own, "to_dict"))]


def _states_read(model: Any) -> list[int]:
    """Hidden states of the encoder that are read, as its configuration says; empty for the last."""
    config = next((own for own in _configs(model) if has_setting(own, "states_read")), None)
    if config is None:
        return []
    chosen = setting(config, "states_read")
    return [int(state) for state in chosen] if isinstance(chosen, (list, tuple)) else [int(chosen)]


def _mask(model: Any, modality: str, ids: tuple[int, ...]) -> str | None:
    """Under which name a model is told which frames are real."""
    if modality != "audio":
        return None
    return spelling_in(model, "mel_mask") or (None if ids else spelling_in(model, "mask"))
