"""The frozen nouns that cross module boundaries."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from hf_steer.errors import PatchError

if TYPE_CHECKING:
    from hf_steer.config import AlignerConfig, SteerConfig
    from hf_steer.gating import Patterns

Key = TypeVar("Key")
Value = TypeVar("Value")

MODALITIES = ("image", "video")
"""What a prompt's vision tokens stand for; both go through the encoder of modality `"image"`."""


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
    """One attention module of the decoder or of the vision tower, or one layer of an encoder.

    Attributes:
        name: dotted path from the root model.
        module: the live module.
        index: its layer (decoder) or block (tower) number, from 0.
    """

    name: str
    module: nn.Module
    index: int


@dataclass(frozen=True)
class Encoder:
    """The ear or the eye of one live model, and where aligners can be put.

    Attributes:
        tower: the encoder.
        layers: those of its layers whose output matters.
        outlet: the module that hands the features on: the encoder itself, or the projector that reads them.
        reads: whether the features are the outlet's input (an LLaVA reads an inner hidden state) or its output.
        size: of a feature there.
        layer_size: of a feature between layers.
        projector: what maps features into the language model's space; None where nothing does.
        placeholder_ids: tokens that the features replace in the prompt.
        mask: the model's argument that says which mel frames or samples are real; None where there is none.
    """

    tower: Any
    layers: tuple[Site, ...]
    outlet: nn.Module
    reads: bool
    size: int
    layer_size: int
    projector: nn.Module | None
    placeholder_ids: tuple[int, ...]
    mask: str | None


@dataclass(frozen=True)
class Anatomy:
    """Where things are in one live model: what a row of `families.FAMILIES` resolves to.

    `decoder` is None where no language model reads a prompt (Whisper, CTC), `tower` without eyes whose attention can be read.
    `layout` names the row of `saliency.LAYOUTS` that says where placeholder tokens lie; None for a model that reads text only.
    `blocks` are those whose output matters; `arrangement` says how the model lays what they saw out as tokens (see
    `families.Family`), and `class_tokens` how many of the tower's tokens come before its patches.
    """

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
    layout: str | None
    merge_size: int
    temporal_patch_size: int
    windowed: bool
    arrangement: str | None
    class_tokens: int
    hidden_size: int
    encoders: Mapping[str, Encoder]

    def __deepcopy__(self, memo: dict[int, Any]) -> Anatomy:
        """A copy with the model's, never without it: a part of the steering would then take all of the base along."""
        if id(self.root) not in memo:
            raise PatchError(
                "a part of a patched model cannot be copied by itself, since it would take the whole model along. PEFT does that "
                "for modules_to_save: leave 'hf_steer' (and the projector that an aligner is at) out of it. Call "
                "hf_steer.training.train_steering(model) after get_peft_model; the aligners are then trained, and saved with the "
                "adapter. For a projector there is SteerConfig(train_projector=True). For a copy of a part: unpatch_model first."
            )
        memo[id(self)] = copied = object.__new__(type(self))
        for name, value in vars(self).items():
            object.__setattr__(copied, name, copy.deepcopy(value, memo))
        return copied


@dataclass(frozen=True)
class PlannedAligner:
    """One aligner, placed.

    Attributes:
        config: what the user asked for.
        encoder: whose features it steers.
        layers: the layers it steers, for placement `"layers"`.
        size: of a feature there.
    """

    config: AlignerConfig
    encoder: Encoder
    layers: tuple[Site, ...]
    size: int


@dataclass(frozen=True)
class Plan:
    """Everything `patch_model` is going to do, checked, before anything is touched.

    Attributes:
        config: what the user asked for, with the base model's type filled in.
        anatomy: where it will be done.
        strengths: layer -> λ per query head, for the layers in which any λ is not 0; 1 for heads whose λ is learned.
        eyes: the vision blocks whose attention is read; empty when the source is not the tower.
        aligners: what is inserted, in the configuration's order.
        projectors: the projectors that are trained and saved with the steering.
        readers: layer -> heads whose attention is the saliency; empty when the source is another.
        patterns: the tokens of think tags and phrases; None where what is said does not matter.
    """

    config: SteerConfig
    anatomy: Anatomy
    strengths: Mapping[int, tuple[float, ...]]
    eyes: tuple[Site, ...]
    aligners: tuple[PlannedAligner, ...] = ()
    projectors: tuple[nn.Module, ...] = ()
    patterns: Patterns | None = None
    readers: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def sees(self) -> bool:
        """Whether the model itself says where to look, when nobody else does."""
        return bool(self.strengths) and self.config.attention is not None and self.config.attention.saliency.source is not None

    @property
    def trains(self) -> bool:
        """Whether the steering has parameters."""
        return self.config.has_weights


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of one picture, video or sound lie.

    Attributes:
        grid: frames, height and width in tokens, where those that have a place form a regular grid; else None.
        cells: `(tokens, 4)` float64: left, top, right, bottom in fractions of the sides of the original picture; or `(tokens, 2)`:
            start and end in seconds of a sound. NaN for a token without a place (a newline, a class token). None where the
            grid has all tokens and covers the whole picture evenly.
        crop_px: the cells are fractions of the centre square that is left of the picture when its shorter side is resized to
            so many pixels; None when they are fractions of the whole.
        size: `(width, height)` in pixels, or `(seconds,)`, of the original, as far as the model's inputs tell; else None.
        slack: by how much each number of `size` may be off (what the processor rounds or pads); infinite where a sound may
            have been cut.
        continues: a full window of a long sound: the next one goes on with it if no token lies between.
    """

    grid: tuple[int, int, int] | None = None
    cells: Tensor | None = None
    crop_px: int | None = None
    size: tuple[float, ...] | None = None
    slack: float = 0.0
    continues: bool = False

    @property
    def tokens(self) -> int:
        return math.prod(self.grid or (0,)) if self.cells is None else len(self.cells)

    @property
    def frames(self) -> int:
        return 1 if self.grid is None else self.grid[0]


@dataclass(frozen=True)
class Span:
    """The tokens of one picture, video or sound in one row of a prompt.

    Attributes:
        modality: `"image"`, `"video"` or `"audio"`.
        row: batch row, before `generate` expands it.
        index: which picture (or video, or sound) of that row, from 0.
        positions: `(tokens,)` key positions; not always contiguous (Qwen3-VL writes timestamps between frames).
        layout: where in the picture or sound each of them lies.
    """

    modality: str
    row: int
    index: int
    positions: Tensor
    layout: Layout

    @property
    def grid(self) -> tuple[int, int, int] | None:
        return self.layout.grid


@dataclass(frozen=True)
class TokenScores:
    """One score per key token, and the group (picture, frame, text) in which it is to be normalised.

    Attributes:
        values: `(batch, keys)` float32, 0 where nothing is said.
        group: `(batch, keys)` int64, -1 where nothing is said.
        groups: how many there are at most, where that is known without asking the device.
    """

    values: Tensor
    group: Tensor
    groups: int | None = None

    def count_groups(self) -> int:
        """How many groups there are."""
        if self.groups is not None:
            return self.groups
        return int(self.group.max()) + 1 if self.group.numel() else 0


@dataclass(frozen=True)
class HeadBias:
    """A low-rank bias on one layer's attention logits: `bias[b,h,q,k] = sum_r query[b,h,q,r] · key[b,k,r]`.

    Attributes:
        query: `(batch or 1, heads, queries or 1, rank)` float32: strength λ times gate.
        key: `(batch, keys, rank)` float32: saliency; further columns carry the mass correction of each group.
        forms: what backends made of both, kept for the other layers of the pass that share this bias.
        key_forms: what they made of `key` alone; one dictionary for all biases over the same keys.
    """

    query: Tensor
    key: Tensor
    forms: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    key_forms: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
