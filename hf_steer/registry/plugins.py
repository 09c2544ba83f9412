"""Installed packages that add rows: what their entry points in the group `hf_steer.plugins` name is called when it is needed.

A name in a file leads to nothing but this: what runs is what is installed here, whatever the file says.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points, packages_distributions
from threading import RLock
from types import ModuleType

GROUP = "hf_steer.plugins"


@dataclass(frozen=True)
class Failure:
    """A plugin that could not be loaded; none of its rows is there.

    Attributes:
        plugin: name of its entry point.
        package: that the entry point came with.
        error: what it raised.
    """

    plugin: str
    package: str | None
    error: Exception

    def __str__(self) -> str:
        package = f" of the package {self.package!r}" if self.package else ""
        return f"the plugin {self.plugin!r}{package} could not be loaded ({type(self.error).__name__}: {self.error})"


@dataclass
class Loading:
    """A plugin that is adding its rows now.

    Attributes:
        package: that it came with.
        undo: takes its rows back, should it fail half-way.
    """

    package: str | None
    undo: list[Callable[[], None]] = field(default_factory=list)


_LOCK = RLock()
_ASKED: set[tuple[str | None, str, str]] = set()
"""Entry points that have been loaded, or are being loaded and look a name up themselves."""
_LOADING: ContextVar[Loading | None] = ContextVar("hf_steer_plugin", default=None)


def current_loading() -> Loading | None:
    """The plugin that adds rows in this thread now; None where somebody calls `register_*` by hand."""
    return _LOADING.get()


def load_plugins() -> list[Failure]:
    """Load every plugin that is installed and was not loaded yet: each once, and again only if it failed."""
    failures = []
    with _LOCK:
        for point in sorted(entry_points(group=GROUP), key=lambda own: (own.name, own.value)):
            place = _package_of(point), point.name, point.value
            if place in _ASKED:
                continue
            _ASKED.add(place)
            try:
                _load(point)
            except BaseException as error:  # other people's code, which may raise anything; whoever asked for a name gets to see it
                _ASKED.discard(place)
                if not isinstance(error, Exception):  # it was interrupted
                    raise
                failures.append(Failure(point.name, place[0], error))
    return failures


def _load(point: EntryPoint) -> None:
    """Import what an entry point names and call it, unless it is a module; all of it or nothing."""
    loading = Loading(_package_of(point))
    token = _LOADING.set(loading)
    try:
        found = point.load()
        if not isinstance(found, ModuleType):
            found()
        loading.undo.clear()
    finally:
        _LOADING.reset(token)
        for undo in reversed(loading.undo):
            undo()


def package_of(module: str) -> str | None:
    """The installed package that a module belongs to; None for a script, a notebook, or a file that lies beside them."""
    top = module.partition(".")[0]
    for point in entry_points(group=GROUP):  # an editable installation tells no more than this
        if point.module.partition(".")[0] == top and point.dist is not None:
            return point.dist.name
    return next(iter(packages_distributions().get(top, ())), None)


def _package_of(point: EntryPoint) -> str | None:
    return None if point.dist is None else point.dist.name
