"""The five tables, and how others add to them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hf_steer.errors import PatchError
from hf_steer.registry.rows import Backend, Family, Gate, Router, Source
from hf_steer.registry.table import Table

FAMILIES: Table[Family] = Table("family", Family, "hf_steer.families", error=PatchError)
BACKENDS: Table[Backend] = Table("backend", Backend, "hf_steer.attention.backends", reserved=("auto",))
SOURCES: Table[Source] = Table("source", Source, "hf_steer.saliency.sources")
GATES: Table[Gate] = Table("gate", Gate, "hf_steer.gates")
ROUTERS: Table[Router] = Table("router", Router, "hf_steer.aligners.routers")
TABLES: Mapping[str, Table[Any]] = MappingProxyType(
    {table.noun: table for table in (FAMILIES, BACKENDS, SOURCES, GATES, ROUTERS)}
)
"""By what a row of theirs is."""


def register_family(name: str, row: Family) -> None:
    """Make a model family known: where things are in a model of this `config.model_type`.

    Args:
        name: `config.model_type`.
        row: its `Family`.

    Raises:
        ConfigError: a name that is taken or is none, or something else than a `Family`.
    """
    FAMILIES.add(name, row, module=_caller())


def register_backend(name: str, row: Backend) -> None:
    """Make another way to carry the bias known: `AttentionConfig(backend=name)`.

    Args:
        name: what users write.
        row: its `Backend`.

    Raises:
        ConfigError: a name that is taken or is none, or something else than a `Backend`.
    """
    BACKENDS.add(name, row, module=_caller())


def register_source(name: str, row: Source) -> None:
    """Make another source of saliency known: `SaliencyConfig(source=name)`.

    Args:
        name: what users write.
        row: its `Source`.

    Raises:
        ConfigError: a name that is taken or is none, or something else than a `Source`.
    """
    SOURCES.add(name, row, module=_caller())


def register_gate(name: str, row: Gate) -> None:
    """Make another gate known: `GateConfig(kind=name)`.

    Args:
        name: what users write.
        row: its `Gate`.

    Raises:
        ConfigError: a name that is taken or is none, or something else than a `Gate`.
    """
    GATES.add(name, row, module=_caller())


def register_router(name: str, row: Router) -> None:
    """Make another aligner known: `AlignerConfig(kind=name)`.

    Args:
        name: what users write.
        row: its `Router`.

    Raises:
        ConfigError: a name that is taken or is none, or something else than a `Router`.
    """
    ROUTERS.add(name, row, module=_caller())


def _caller() -> str:
    """Name of the module that called `register_*`."""
    return str(sys._getframe(2).f_globals.get("__name__", "__main__"))
