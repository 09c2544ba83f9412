"""Key-value caches of transformers: where a pass leaves them, how long they are, what layers will see, what moves their rows."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils.generic import ModelOutput

from hf_steer.errors import PatchError

Follow = Callable[[Any, Any], Any]
"""From what rides on a cache, and the argument of the method that moved its rows, to what rides on it now."""

ROW_MOVES: Mapping[str, str] = {
    "reorder_cache": "select", "batch_select_indices": "select", "batch_repeat_interleave": "repeat", "reset": "drop",
}  # fmt: skip
"""Method of a cache -> what it does to rows."""
ROWS_STAY = frozenset(
    {
        "activate_past_recording", "batch_size", "check_dynamic_cache", "crop", "early_initialization", "get_conv_state",
        "get_mask_sizes", "get_max_cache_shape", "get_max_length", "get_query_offset", "get_recurrent_state", "get_seq_length",
        "has_previous_state", "is_compileable", "is_croppable", "is_dummy", "is_initialized", "is_linear", "is_recording_past",
        "is_sliding", "lazy_initialization", "max_batch_size", "max_cache_len", "offload", "prefetch", "update",
        "update_conv_state", "update_indexer", "update_recurrent_state",
    }
)  # fmt: skip
"""Methods and properties of caches after which every row still holds its own keys; after any other they may not."""


SELF_PART = "self_attention_cache"
"""Where an encoder-decoder's pair of caches has the one that holds the keys of its own tokens."""


def made_caches(output: Any) -> list[Any]:
    """The caches that a model gives back, under whatever name, as they are."""
    values = output.values() if isinstance(output, ModelOutput) else output if isinstance(output, (tuple, list)) else ()
    return [value for value in values if isinstance(value, Cache)]


def caches_after(given: Any, output: Any) -> list[Any]:
    """The caches that hold a model's own tokens after a pass: the one that it was given, or None, and others that it gives back."""
    found = [] if given is None else [given]
    for cache in made_caches(output):
        own = getattr(cache, SELF_PART, cache)
        if own is not given:
            found.append(own)
    return found


def past_of(cache: Any) -> int | Tensor:
    """Keys in a cache: a number, or a tensor for a static cache; 0 without one."""
    return 0 if cache is None else cache.get_seq_length()


def keys_seen(cache: Any, queries: int, slots: Sequence[int | None]) -> list[tuple[int, int]]:
    """How many keys layers will attend to in a pass of so many queries, and the position of the first.

    Args:
        cache: before it is updated; None without one.
        queries: of the pass.
        slots: where the cache holds each layer's keys; None for all keys so far.
    """
    if cache is None:
        return [(queries, 0)] * len(slots)
    return [_sizes(cache, queries, slot) for slot in slots]


def _sizes(cache: Any, queries: int, slot: int | None) -> tuple[int, int]:
    if slot is not None:
        try:
            return cache.get_mask_sizes(queries, slot)  # type: ignore[no-any-return]
        except ValueError:  # a layer that has no keys of its own there, but shares those of another (Gemma 3n)
            pass
    return int(past_of(cache)) + queries, 0


def whole_keys(cache: Any) -> Tensor | None:
    """Keys `(rows, heads, keys, head_dim)` of the last layer that keeps all of them; None where no layer shows them.

    The last, since what steers the layers before it shows in its keys: equal prompts that look elsewhere are told apart by them.
    """
    for layer in reversed(getattr(cache, "layers", None) or ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.ndim == 4 and not getattr(layer, "is_sliding", False):
            return keys
    return None


def first_keys(cache: Any) -> Tensor | None:
    """Keys by which rows are known: of a layer that keeps all, or else of the first sliding one; None while they come and go.

    An offloading cache copies its layers between devices while other code runs, so they may be read half moved.
    """
    if getattr(cache, "offloading", False):
        return None
    keys = whole_keys(cache)
    if keys is None:
        held = (getattr(layer, "keys", None) for layer in getattr(cache, "layers", None) or ())
        keys = next((own for own in held if isinstance(own, Tensor) and own.ndim == 4), None)
    return keys


def begins_with_first(cache: Any, keys: Tensor) -> bool:
    """Whether these keys still begin with those of the first token: a window that is full has let go of it."""
    return keys is whole_keys(cache) or int(past_of(cache)) <= keys.shape[2]


def stamp_of(keys: Tensor | None) -> tuple[int, int | None]:
    """By which it is seen, without looking at them, that keys were exchanged or written to."""
    return id(keys), None if keys is None or keys.is_inference() else keys._version


def shown_keys(cache: Any, length: int | None) -> tuple[Tensor | None, tuple[int, int | None], bool]:
    """The keys by which rows are known, their stamp, and whether they show the first `length` tokens, none of which has left.

    Without a length the last is not asked: a static cache would have to ask the device.
    """
    keys = first_keys(cache)
    shown = length is not None and keys is not None and keys.shape[2] >= length
    if shown and keys is not None and length is not None:
        shown = int(past_of(cache)) >= length and begins_with_first(cache, keys)
    return keys, stamp_of(keys), shown


def copy_of(cache: Any) -> Any:
    """An independent cache with the same keys."""
    return copy.deepcopy(cache)


_UNKNOWN: dict[type, tuple[str, ...]] = {}


def unknown_moves(kind: type) -> tuple[str, ...]:
    """Public methods of a cache class of which it is not known what they do to rows."""
    if kind not in _UNKNOWN:
        public = (name for name in dir(kind) if not name.startswith("_"))
        known = ROW_MOVES.keys() | ROWS_STAY
        functions = (name for name in public if name not in known and inspect.isfunction(inspect.getattr_static(kind, name)))
        _UNKNOWN[kind] = tuple(functions)
    return _UNKNOWN[kind]


class Watched:
    """A method of one cache that tells the rider about it. It holds the cache weakly, so that both die when they did before.

    Args:
        cache: whose method it is.
        name: of the method.
        told: is called with the cache, the name and the method's argument once it has run.
    """

    def __init__(self, cache: Any, name: str, told: Callable[[Any, str, Any], None]) -> None:
        self.cache: Callable[[], Any] = weakref.ref(cache)
        self.name, self.told = name, told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache()
        if cache is None:
            raise PatchError(f"{self.name} was called on a shallow copy of a cache that is gone; copy caches with copy.deepcopy.")
        result = getattr(type(cache), self.name)(cache, *args, **kwargs)
        self.told(cache, self.name, args[0] if args else next(iter(kwargs.values()), None))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Watched:
        """Of the copied cache, which is in the memo by the time its attributes are copied."""
        return Watched(memo.get(id(self.cache()), self.cache()), self.name, self.told)

    def __reduce__(self) -> Any:
        return Watched, (self.cache(), self.name, self.told)


def watch_rows(cache: Any, told: Callable[[Any, str, Any], None]) -> None:
    """Let a cache tell whenever its rows move, or may have."""
    compiling = torch.compiler.is_compiling()
    for name in ROW_MOVES if compiling else (*ROW_MOVES, *unknown_moves(type(cache))):
        there = vars(cache).get(name)
        if not isinstance(there, Watched) or (not compiling and there.cache() is not cache):
            setattr(cache, name, Watched(cache, name, told))
