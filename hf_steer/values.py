"""The frozen nouns that cross module boundaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_steer.config import SteerConfig

Key = TypeVar("Key")
Value = TypeVar("Value")

MODALITIES = ("image", "video")


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


@dataclass(frozen=True)
class Site:
    """One attention module of the decoder or of the vision tower.

    Attributes:
        name: dotted path from the root model.
        module: the live module.
        index: its layer (decoder) or block (tower) number, from 0.
    """

    name: str
    module: nn.Module
    index: int


@dataclass(frozen=True)
class Anatomy:
    """Where things are in one live model: what a row of `families.FAMILIES` resolves to. `tower` is None without eyes."""

    family: str
    root: Any
    base: nn.Module
    decoder: Any
    layers: tuple[Site, ...]
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    tower: Any
    blocks: tuple[Site, ...]
    placeholder_ids: Mapping[str, int]
    merge_size: int
    temporal_patch_size: int
    windowed: bool


@dataclass(frozen=True)
class Plan:
    """Everything `patch_model` is going to do, checked, before anything is touched.

    Attributes:
        config: what the user asked for, with the base model's type filled in.
        anatomy: where it will be done.
        strengths: layer -> λ per query head, for the layers in which any λ is not 0.
        eyes: the vision blocks whose attention is read; empty when the source is not the tower.
    """

    config: SteerConfig
    anatomy: Anatomy
    strengths: Mapping[int, tuple[float, ...]]
    eyes: tuple[Site, ...]


@dataclass(frozen=True)
class Span:
    """The tokens of one picture or one video in one row of a prompt.

    Attributes:
        modality: `"image"` or `"video"`.
        row: batch row, before `generate` expands it.
        index: which picture (or video) of that row, from 0.
        positions: `(tokens,)` key positions; not always contiguous (Qwen3-VL writes timestamps between frames).
        grid: frames, height, width, counted in tokens; None when the caller's encoder outputs hide it.
    """

    modality: str
    row: int
    index: int
    positions: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class TokenScores:
    """One score per key token, and the group (picture, frame, text) in which it is to be normalised.

    Attributes:
        values: `(batch, keys)` float32, 0 where nothing is said.
        group: `(batch, keys)` int64, -1 where nothing is said.
    """

    values: Tensor
    group: Tensor


@dataclass(frozen=True)
class HeadBias:
    """A low-rank bias on one layer's attention logits: `bias[b,h,q,k] = sum_r query[b,h,q,r] · key[b,k,r]`.

    Attributes:
        query: `(batch or 1, heads, queries or 1, rank)` float32: strength λ times gate.
        key: `(batch, keys, rank)` float32: saliency; further columns carry the mass correction of each group.
    """

    query: Tensor
    key: Tensor
