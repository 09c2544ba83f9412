"""Checks of single configuration values: they return the canonical form, or raise a `ConfigError` that names the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from hf_steer.errors import ConfigError
from hf_steer.values import FrozenMap

Heads: TypeAlias = Literal["all"] | Mapping[int, "tuple[int, ...] | Literal['all']"]
Strength: TypeAlias = float | Mapping[int, "float | Mapping[int, float]"]


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False; got {value!r}.")


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}.")


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number; got {value!r}.")


def check_indices(name: str, values: Any, *, signed: bool = False) -> tuple[int, ...]:
    try:
        indices = tuple(values)
    except TypeError as error:
        raise ConfigError(f"{name} must be a sequence of integers; got {values!r}.") from error
    if not indices or any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
        raise ConfigError(f"{name} must be a non-empty sequence of integers; got {values!r}.")
    if not signed and min(indices) < 0:
        raise ConfigError(f"{name} must not be negative; got {values!r}.")
    if len(set(indices)) != len(indices):
        raise ConfigError(f"{name} names one twice; got {values!r}.")
    return indices


def check_heads(heads: Any, name: str = "attention.heads") -> Heads:
    if heads == "all":
        return "all"
    if not isinstance(heads, Mapping) or not heads:
        raise ConfigError(f'{name} must be "all" or a mapping of layers to heads; got {heads!r}.')
    return FrozenMap(
        {
            layer: "all" if chosen == "all" else check_indices(f"{name} of layer {layer}", chosen)
            for layer, chosen in _by_number(name, heads, signed=True).items()
        }
    )


def check_strength(strength: Any) -> Strength:
    if not isinstance(strength, Mapping):
        check_number("attention.strength", strength)
        return float(strength)
    if not strength:
        raise ConfigError("attention.strength must not be empty; give one number, or one per layer or head.")
    checked: dict[int, float | Mapping[int, float]] = {}
    for layer, value in _by_number("attention.strength", strength, signed=True).items():
        if isinstance(value, Mapping):
            by_head = _by_number(f"attention.strength of layer {layer}", value)
            for head, number in by_head.items():
                check_number(f"attention.strength of layer {layer}, head {head}", number)
            checked[layer] = FrozenMap({head: float(number) for head, number in by_head.items()})
        else:
            check_number(f"attention.strength of layer {layer}", value)
            checked[layer] = float(value)
    return FrozenMap(checked)


def check_schedule(schedule: Any, phases: tuple[str, ...]) -> Mapping[str, float] | None:
    if schedule is None:
        return None
    if not isinstance(schedule, Mapping) or not schedule or not set(schedule) <= set(phases):
        raise ConfigError(f"attention.schedule must map some of {', '.join(phases)} to factors on λ; got {schedule!r}.")
    for phase, factor in schedule.items():
        check_number(f"attention.schedule of {phase}", factor)
    return FrozenMap({phase: float(factor) for phase, factor in schedule.items()})


def check_tags(tags: Any) -> tuple[str, str]:
    given = tuple(tags) if isinstance(tags, (tuple, list)) else ()
    if len(given) != 2 or not all(isinstance(tag, str) and tag for tag in given) or given[0] == given[1]:
        raise ConfigError(f"attention.think_tags must be two different strings, such as ('<think>', '</think>'); got {tags!r}.")
    return given[0], given[1]


def _by_number(name: str, values: Mapping[Any, Any], *, signed: bool = False) -> dict[int, Any]:
    """The same values under layer or head numbers; JSON has string keys only: `{"1": [0, 3]}` is `{1: [0, 3]}`."""
    try:
        keys = [int(key) if isinstance(key, str) else key for key in values]
    except ValueError as error:
        raise ConfigError(f"{name}: keys must be layer or head numbers ({error}).") from error
    return dict(zip(check_indices(name, keys, signed=signed), values.values(), strict=True))
