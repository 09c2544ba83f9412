"""A mapping that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class FrozenMap(Mapping[Key, Value], Generic[Key, Value]):
    """An immutable, hashable mapping that equals the `dict` with the same items; survives copy and pickle."""

    def __init__(self, items: Mapping[Key, Value]) -> None:
        self._items = tuple(items.items())

    def __getitem__(self, key: Key) -> Value:
        for own, value in self._items:
            if own == key:
                return value
        raise KeyError(key)

    def __iter__(self) -> Iterator[Key]:
        return (key for key, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items))

    def __repr__(self) -> str:
        return repr(dict(self._items))
