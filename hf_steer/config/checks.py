"""Checks of single configuration values: they return the canonical form, or raise a `ConfigError` that names the field."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sized
from typing import Any, Literal, TypeAlias

from hf_steer.config.frozen import FrozenMap
from hf_steer.errors import ConfigError, shown

Heads: TypeAlias = Literal["all"] | Mapping[int, "tuple[int, ...] | Literal['all']"]
Strength: TypeAlias = float | Mapping[int, "float | Mapping[int, float]"]
MOST_INDICES = 1024
"""Layers, heads or blocks that one field may name: more than any model has, and few enough to be looked through."""
_LARGEST = 3.4028234663852886e38


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {shown(value)}.")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False; got {shown(value)}.")


def check_count(name: str, value: Any, *, most: int | None = None) -> int:
    whole = plain(value)
    if not isinstance(whole, int) or isinstance(whole, bool) or whole < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1; got {shown(value)}.")
    if most is not None and whole > most:
        raise ConfigError(f"{name} must be at most {most:,}; got {shown(value)}.")
    return whole


def check_number(name: str, value: Any) -> float:
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not _finite(number):
        beyond = isinstance(number, (int, float)) and not isinstance(number, bool) and _LARGEST < abs(number) < float("inf")
        limit = f" in float32, at most {_LARGEST:.1e} in size" if beyond else ""
        raise ConfigError(f"{name} must be a finite number{limit}; got {shown(value)}.")
    return number


def check_indices(name: str, values: Any, *, signed: bool = False, bits: int = 32) -> tuple[int, ...]:
    if isinstance(values, Sized) and not isinstance(values, str) and len(values) > MOST_INDICES:
        raise ConfigError(f"{name} names {len(values):,}; a model has at most {MOST_INDICES:,}.")
    try:
        indices = tuple(plain(value) for value in values)
    except TypeError as error:
        raise ConfigError(f"{name} must be a sequence of integers; got {shown(values)}.") from error
    if not indices or any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
        raise ConfigError(f"{name} must be a non-empty sequence of integers; got {shown(values)}.")
    if max(map(abs, indices)) >= 2**bits:
        raise ConfigError(f"{name} must be integers of {bits} bits; got {shown(values)}.")
    if not signed and min(indices) < 0:
        raise ConfigError(f"{name} must not be negative; got {shown(values)}.")
    if len(set(indices)) != len(indices):
        raise ConfigError(f"{name} names one twice; got {shown(values)}.")
    return indices


def plain(value: Any) -> Any:
    """A whole or real number as Python's own `int` or `float`, also out of numpy's and torch's scalars; all else as it came."""
    if type(value) in (int, float, str, bool):
        return value
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except RuntimeError as error:  # torch's, of a tensor on the meta device
            raise ConfigError(f"a number was expected; got {shown(value)}, which holds none ({error}).") from error
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _finite(number: float) -> bool:
    """Whether it is a number in float32 as well, which is what λ and the others become."""
    return -_LARGEST <= number <= _LARGEST  # compared as it is: an integer may be beyond every float


def check_heads(heads: Any, name: str = "attention.heads") -> Heads:
    if isinstance(heads, str) and heads == "all":
        return "all"
    if not isinstance(heads, Mapping) or not heads:
        raise ConfigError(f'{name} must be "all" or a mapping of layers to heads; got {shown(heads)}.')
    return FrozenMap(
        {
            layer: "all" if isinstance(chosen, str) and chosen == "all" else check_indices(f"{name} of layer {layer}", chosen)
            for layer, chosen in _by_number(name, heads, signed=True).items()
        }
    )


def check_strength(strength: Any) -> Strength:
    if not isinstance(strength, Mapping):
        return float(check_number("attention.strength", strength))
    if not strength:
        raise ConfigError("attention.strength must not be empty; give one number, or one per layer or head.")
    checked: dict[int, float | Mapping[int, float]] = {}
    for layer, value in _by_number("attention.strength", strength, signed=True).items():
        if isinstance(value, Mapping):
            by_head = _by_number(f"attention.strength of layer {layer}", value)
            name = f"attention.strength of layer {layer}, head"
            checked[layer] = FrozenMap({head: float(check_number(f"{name} {head}", number)) for head, number in by_head.items()})
        else:
            checked[layer] = float(check_number(f"attention.strength of layer {layer}", value))
    return FrozenMap(checked)


def check_schedule(schedule: Any, phases: tuple[str, ...]) -> Mapping[str, float] | None:
    if schedule is None:
        return None
    if not isinstance(schedule, Mapping) or not schedule or not set(schedule) <= set(phases):
        raise ConfigError(f"attention.schedule must map some of {', '.join(phases)} to factors on λ; got {shown(schedule)}.")
    return FrozenMap(
        {phase: float(check_number(f"attention.schedule of {phase}", factor)) for phase, factor in schedule.items()}
    )


def check_tags(tags: Any) -> tuple[str, str]:
    given = tuple(tags) if isinstance(tags, (tuple, list)) else ()
    if len(given) != 2 or not all(isinstance(tag, str) and tag for tag in given) or given[0] == given[1]:
        raise ConfigError(f"attention.think_tags must be two different strings, as ('<think>', '</think>'); got {shown(tags)}.")
    return given[0], given[1]


def _by_number(name: str, values: Mapping[Any, Any], *, signed: bool = False) -> dict[int, Any]:
    """The same values under layer or head numbers; JSON has string keys only: `{"1": [0, 3]}` is `{1: [0, 3]}`."""
    if len(values) > MOST_INDICES:
        raise ConfigError(f"{name} names {len(values):,}; a model has at most {MOST_INDICES:,}.")
    try:
        keys = [int(key) if isinstance(key, str) else key for key in values if len(str(key)) < 20]
    except ValueError as error:
        raise ConfigError(f"{name}: keys must be layer or head numbers ({error}).") from error
    if len(keys) < len(values):
        raise ConfigError(f"{name}: keys must be layer or head numbers; got one of {max(len(str(key)) for key in values)} digits.")
    return dict(zip(check_indices(name, keys, signed=signed), values.values(), strict=True))
