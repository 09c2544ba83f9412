"""Which installed package each name in a configuration came from, so that another machine can say what it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hf_steer.errors import ConfigError, shown
from hf_steer.registry import TABLES, Table
from hf_steer.registry.table import NAME

PLUGINS = "plugins"
"""Its key in `steer_config.json`; there is none where every name is ours."""
_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")


def note_plugins(config: Any) -> dict[str, dict[str, str | None]]:
    """Table -> name -> package, for the names in a `SteerConfig` that are not ours; None where no package has it."""
    noted: dict[str, dict[str, str | None]] = {}
    for noun, name in _named_in(config):
        table = TABLES[noun]
        if name in table and not table.is_ours(name):
            noted.setdefault(noun, {})[name] = table.provider_of(name)
    return noted


def _named_in(config: Any) -> Iterator[tuple[str, str]]:
    if config.base_model_type is not None:
        yield "family", config.base_model_type
    for aligner in config.aligners:
        yield "router", aligner.kind
    attention = config.attention
    if attention is None:
        return
    yield "backend", attention.backend
    if attention.saliency.source is not None:
        yield "source", attention.saliency.source
    if attention.gate is not None:
        yield "gate", attention.gate.kind


def refuse_missing(noted: Any) -> None:
    """Check that all names which a saved configuration notes as foreign are known here, and from the same packages.

    Nothing is installed or imported by what a file says: installed plugins are asked, as for any unknown name.

    Raises:
        ConfigError: a package that is missing, is another one, or no longer has the name; a note that is none of ours.
    """
    for noun, names in _checked(noted).items():
        table = TABLES[noun]
        for name, package in names.items():
            row, failures = table.look(name)
            if row is not None:
                _refuse_other(table, name, package)
                continue
            broken = [failure for failure in failures if _same(failure.package, package)]
            why = f"Of what is installed here, {broken[0]}." if broken else _remedy(noun, name, package)
            raise ConfigError(f"{noun} {name!r} is not known here. {why}") from (broken[0].error if broken else None)


def _checked(noted: Any) -> Mapping[str, Mapping[str, str | None]]:
    good = isinstance(noted, Mapping) and all(
        noun in TABLES
        and isinstance(names, Mapping)
        and all(_is_name(name, NAME) and (own is None or _is_name(own, _PACKAGE)) for name, own in names.items())
        for noun, names in noted.items()
    )
    if not good:
        raise ConfigError(
            f"{PLUGINS!r} maps {', '.join(TABLES)} to names and the packages that they came from; got {shown(noted)}. "
            "Save it again."
        )
    return noted  # type: ignore[no-any-return]


def _is_name(name: Any, form: re.Pattern[str]) -> bool:
    return isinstance(name, str) and form.fullmatch(name) is not None


def _refuse_other(table: Table[Any], name: str, package: str | None) -> None:
    """A row of the same name from another package is another thing; one that hf_steer has taken over is the same."""
    here = table.provider_of(name)
    if package is not None and here is not None and not _same(here, package):
        raise ConfigError(
            f"{table.noun} {name!r} came from the package {package!r} when this was saved, and here it comes from {here!r}: "
            f"another thing of the same name. Install {package!r} instead, if you trust it."
        )


def _same(one: str | None, other: str | None) -> bool:
    """Whether two spellings are of one package."""
    normal = [None if name is None else re.sub(r"[-_.]+", "-", name).lower() for name in (one, other)]
    return normal[0] == normal[1]


def _remedy(noun: str, name: str, package: str | None) -> str:
    if package is None:
        return (
            "When this was saved it came from a script or notebook and not from an installed package; call "
            f"hf_steer.register_{noun}({name!r}, row) with its row before this is loaded."
        )
    try:
        return (
            f"It comes with the package {package!r}, of which {version(package)} is installed here and has none of this name. "
            f"Install the version that it was saved with, or a newer one: pip install -U {package}."
        )
    except PackageNotFoundError:
        return f"It comes with the package {package!r}, which is not installed here. If you trust it: pip install {package}."
