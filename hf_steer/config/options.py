"""The options of a named row: those that a configuration has a field for, and those that are the row's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_steer.config.checks import check_flag, check_number, plain
from hf_steer.config.frozen import FrozenMap
from hf_steer.errors import ConfigError, shown

OWN = "options"
"""The field for options that a row of somebody else's brings along; a file has it only where there are any."""


def fill_options(config: Any, label: str, options: Mapping[str, Any], fields: tuple[str, ...]) -> None:
    """Give a frozen configuration that is being made the options of its row, where none are given.

    Args:
        config: with a field `options` and one for each of `fields`; None where nothing is given.
        label: the row, as a message names it.
        options: name -> value where none is given.
        fields: options that have a field.

    Raises:
        ConfigError: an option that the row does not have, or of another type than the row's.
    """
    foreign = [name for name in fields if getattr(config, name) is not None and name not in options]
    if foreign:
        raise ConfigError(f"{label} has no {', '.join(foreign)}; it has {_listed(options)}.")
    for name in fields:
        if name in options and getattr(config, name) is None:
            object.__setattr__(config, name, options[name])
    own = {name: value for name, value in options.items() if name not in fields}
    object.__setattr__(config, OWN, _own_options(label, getattr(config, OWN), own))


def own_options(config: Any) -> Mapping[str, Any]:
    """The row's own options as keywords for a function of the row."""
    return config.options or {}


def _own_options(label: str, given: Any, own: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"options of {label} must be a mapping of names to values; got {shown(given)}.")
    foreign = [shown(name) for name in given or () if name not in own]
    if foreign:
        raise ConfigError(f"{label} has no option {', '.join(foreign)} of its own; it has {_listed(own)}.")
    checked = {name: _checked(f"option {name!r} of {label}", (given or {}).get(name, value), value) for name, value in own.items()}
    return FrozenMap(checked) if checked else None


def _checked(name: str, value: Any, like: Any) -> Any:
    """A value of the type that the row's own has: what JSON can hold, so that it comes back as it was."""
    value = plain(value)
    if like is None:
        return value if value is None or isinstance(value, (str, bool)) else check_number(name, value)
    if isinstance(like, bool):
        check_flag(name, value)
        return value
    if isinstance(like, (int, float)):
        number = check_number(name, value)
        if isinstance(like, int) and not isinstance(number, int):
            raise ConfigError(f"{name} must be a whole number, as {like} is; got {shown(value)}.")
        return number
    if isinstance(like, str) and isinstance(value, str):
        return value
    if isinstance(like, tuple) and isinstance(value, (tuple, list)):
        return tuple(_checked(name, item, like[0] if like else None) for item in value)
    raise ConfigError(f"{name} must be a {type(like).__name__}, as {shown(like)} is; got {shown(value)}.")


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(options) or "none"
