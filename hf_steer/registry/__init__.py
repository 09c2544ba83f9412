"""The five tables that others may add to: families, backends, sources, gates and routers. A name in them is one row."""

from hf_steer.registry.rows import Backend, EncoderRow, Family, Gate, Router, Source
from hf_steer.registry.table import Table
from hf_steer.registry.tables import (
    BACKENDS,
    FAMILIES,
    GATES,
    ROUTERS,
    SOURCES,
    TABLES,
    register_backend,
    register_family,
    register_gate,
    register_router,
    register_source,
)

__all__ = [
    "BACKENDS",
    "FAMILIES",
    "GATES",
    "ROUTERS",
    "SOURCES",
    "TABLES",
    "Backend",
    "EncoderRow",
    "Family",
    "Gate",
    "Router",
    "Source",
    "Table",
    "register_backend",
    "register_family",
    "register_gate",
    "register_router",
    "register_source",
]
