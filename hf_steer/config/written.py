"""From configurations to the values of JSON and back, strictly."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from hf_steer.config.options import OWN
from hf_steer.errors import ConfigError

SEVERAL, MOST = "aligners", 6
"""The field that holds several: one per modality and placement."""


def build(cls: type, values: Mapping[str, Any], nested: Mapping[str, type], where: str = "") -> Any:
    """A configuration out of its values: every key known, every nested configuration built by its own class.

    Args:
        cls: of the configuration.
        values: as JSON has them.
        nested: field -> class of the configuration that it holds, or of those in a list that it holds.
        where: it lies in the outermost one.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a missing one, or a value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the configuration'} must be a mapping; got {type(values).__name__}.")
    names = [item.name for item in dataclasses.fields(cls)]
    foreign = [str(key)[:60] for key in values if key not in names][:5]
    unknown = [
        f"{key!r}" + (f" (did you mean {near[0]!r}?)" if (near := difflib.get_close_matches(key, names, 1)) else "")
        for key in foreign
    ]
    if unknown:
        raise ConfigError(f"{where or cls.__name__} has no {', '.join(unknown)}; it has {', '.join(names)}.")
    lacking = [item.name for item in dataclasses.fields(cls) if item.name not in values and _is_needed(item)]
    if lacking:
        raise ConfigError(f"{where or cls.__name__} lacks {', '.join(lacking)}.")
    return cls(**{key: _built(key, value, nested, f"{where}.{key}".lstrip(".")) for key, value in values.items()})


def _built(key: str, value: Any, nested: Mapping[str, type], where: str) -> Any:
    if key not in nested or value is None:
        return value
    if key != SEVERAL:
        return build(nested[key], value, nested, where)
    if not isinstance(value, (list, tuple)):
        return value  # refused by its own check
    if len(value) > MOST:
        raise ConfigError(f"{where} has {len(value):,} entries; one per modality and placement makes {MOST}.")
    return tuple(build(nested[key], own, nested, f"{where}[{index}]") for index, own in enumerate(value))


def _is_needed(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def to_plain(value: Any) -> Any:
    """The values of JSON; options of a row's own only where there are any."""
    if dataclasses.is_dataclass(value):
        named = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {name: to_plain(own) for name, own in named.items() if name != OWN or own is not None}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value
