"""A table of named rows: a literal one of ours, open to others."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from threading import RLock
from typing import Generic, TypeVar

from hf_steer.errors import ConfigError, SteerError, shown
from hf_steer.registry.plugins import GROUP, Failure, current_loading, load_plugins, package_of

Row = TypeVar("Row")
UNKNOWN = "{noun} must be one of {known}; got {got}{near}."
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Origin:
    """Where a row that is not ours came from.

    Attributes:
        package: whose plugin added it; None where somebody called `register_*` by hand.
        module: that did.
    """

    package: str | None
    module: str


class Table(Mapping[str, Row], Generic[Row]):
    """Rows by name. A name that is not there yet is asked of the installed plugins, which are loaded by then and not before.

    Iterating gives our rows, and those that others have added so far.

    Args:
        noun: what a row is.
        row: class of the rows.
        home: module with our rows, `OURS`; imported when a row is first looked up, so that rooms below it may look up, too.
        error: that an unknown name raises.
        reserved: names that mean something else already.
    """

    def __init__(
        self, noun: str, row: type[Row], home: str, *, error: type[SteerError] = ConfigError, reserved: tuple[str, ...] = ()
    ) -> None:
        self.noun = noun
        self._row, self._home, self._error, self._reserved = row, home, error, reserved
        self.rows: dict[str, Row] = {}  # replaced, never changed: whoever reads needs no lock
        self._origins: dict[str, Origin] = {}
        self._has_ours = False
        self._lock = RLock()

    def __getitem__(self, name: str) -> Row:
        row = self.rows.get(name)
        return self.find(name) if row is None else row

    def __iter__(self) -> Iterator[str]:
        return iter(self._with_ours())

    def __len__(self) -> int:
        return len(self._with_ours())

    def __contains__(self, name: object) -> bool:
        return self.look(name)[0] is not None

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def find(self, name: object, says: str = UNKNOWN, *, besides: tuple[object, ...] = ()) -> Row:
        """The row of a name.

        Args:
            name: of a row; anything else is refused like an unknown name.
            says: how the error begins; `{noun}`, `{known}`, `{got}` and `{near}` are filled in.
            besides: what is allowed beside names of rows.

        Raises:
            SteerError: of the table's own class. No such row, in us or in what is installed; a plugin that could not be loaded
                is named, and is the cause.
        """
        row, failures = self.look(name)
        if row is not None:
            return row
        close = difflib.get_close_matches(name, list(self), 1) if isinstance(name, str) else []
        near = f" (the nearest is {close[0]!r})" if close else ""
        known = ", ".join(map(repr, (*besides, *self)))
        message = says.format(noun=self.noun, known=known, got=shown(name), near=near)
        if failures:
            broken = "; ".join(map(str, failures))
            raise self._error(f"{message} Perhaps it is one of a plugin that is broken: {broken}.") from failures[0].error
        raise self._error(
            f"{message} Others come with packages that are installed and have an entry point in {GROUP!r}, or with "
            f"hf_steer.register_{self.noun}(name, row)."
        )

    def look(self, name: object) -> tuple[Row | None, list[Failure]]:
        """A row, after asking for it, or None; and which plugins could not be loaded meanwhile."""
        if not isinstance(name, str):
            return None, []
        row = self._with_ours().get(name)
        if row is not None:
            return row, []
        failures = load_plugins()
        row = self.rows.get(name)
        if row is not None:
            for failure in failures:  # of others than the one that was asked for
                warnings.warn(f"{failure}; it is left out.", stacklevel=4)
        return row, failures

    def add(self, name: str, row: Row, *, module: str) -> None:
        """Add a row of somebody else's.

        Args:
            name: letters, digits, `_`, `-` and `.`.
            row: an equal one that is there already is no error.
            module: that adds it.

        Raises:
            ConfigError: a name that is taken or is none, or a row of another class.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(
                f"the name of a {self.noun} begins with a letter and has letters, digits, '_', '-' and '.' only; got {shown(name)}."
            )
        if not isinstance(row, self._row):
            raise ConfigError(f"a {self.noun} is an hf_steer.{self._row.__name__}(...); got {shown(row)} for {name!r}.")
        loading = current_loading()
        self._with_ours()
        with self._lock:
            taken = self.rows.get(name)
            if taken is not None and taken == row:
                return
            if taken is not None or name in self._reserved:
                raise ConfigError(
                    f"there is a {self.noun} {name!r} already, {self._owner(name)}; a name means one thing. Take another name."
                )
            self.rows = {**self.rows, name: row}
            self._origins[name] = Origin(None if loading is None else loading.package, module)
        if loading is not None:
            loading.undo.append(partial(self.remove, name))

    def remove(self, name: str) -> None:
        """Take out a row that somebody has added.

        Raises:
            ConfigError: one of ours, or none.
        """
        with self._lock:
            if name not in self._origins:
                added = ", ".join(map(repr, self._origins)) or "none"
                raise ConfigError(f"{self.noun} {shown(name)} was not added by anybody; those that were: {added}.")
            self.rows = {own: row for own, row in self.rows.items() if own != name}
            del self._origins[name]

    def is_ours(self, name: str) -> bool:
        """Whether hf_steer itself has the row; False as well where nobody has."""
        return name in self and name not in self._origins

    def provider_of(self, name: str) -> str | None:
        """The installed package that a row came from; None for ours, and for those of a script or notebook."""
        self[name]
        origin = self._origins.get(name)
        return None if origin is None else origin.package or package_of(origin.module)

    def _owner(self, name: str) -> str:
        origin = self._origins.get(name)
        if origin is None:
            return "which is hf_steer's own"
        return f"from the package {origin.package!r}" if origin.package else f"from the module {origin.module!r}"

    def _with_ours(self) -> dict[str, Row]:
        if not self._has_ours:
            ours = import_module(self._home).OURS  # before the lock is taken: another thread may be importing just that
            with self._lock:
                if not self._has_ours:
                    self.rows, self._has_ours = {**ours, **self.rows}, True
        return self.rows
