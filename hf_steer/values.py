"""The frozen nouns that cross rooms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

MODALITIES = ("image", "video")
"""What a prompt's vision tokens stand for; both go through the encoder of modality `"image"`."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of one picture, video or sound lie.

    Attributes:
        grid: frames, height and width in tokens, where those that have a place form a regular grid; else None.
        cells: `(tokens, 4)` float64: left, top, right, bottom in fractions of the sides of the original picture; or `(tokens, 2)`:
            start and end in seconds of a sound. NaN for a token without a place (a newline, a class token). None where the
            grid has all tokens and covers the whole picture evenly.
        fit: from `(width, height)` of the original picture to its cells, where the model's inputs do not tell its shape and the
            cells depend on it (a centre square, tiles); `cells` are then a stand-in, of a square. Raises SaliencyError for a
            shape that the inputs contradict. None where the cells are known.
        size: `(width, height)` in pixels, or `(seconds,)`, of the original, as far as the model's inputs tell; else None.
        slack: by how much each number of `size` may be off (what the processor rounds or pads); infinite where a sound may
            have been cut.
        tokens: how many it has.
        frames: how many it has; 1 where they do not form a grid.
        continues: a full window of a long sound: the next one goes on with it if no token lies between.
    """

    grid: tuple[int, int, int] | None = None
    cells: Tensor | None = None
    fit: Callable[[tuple[float, float]], Tensor] | None = None
    size: tuple[float, ...] | None = None
    slack: float = 0.0
    continues: bool = False
    tokens: int = field(init=False)
    frames: int = field(init=False)

    def __post_init__(self) -> None:
        tokens = math.prod(self.grid or (0,)) if self.cells is None else len(self.cells)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "frames", 1 if self.grid is None else self.grid[0])

    def at(self, size: tuple[float, float] | None) -> Layout:
        """Of a picture of this `(width, height)`; the same where it is not said, or where nothing depends on it."""
        return self if self.fit is None or size is None else replace(self, cells=self.fit(size), fit=None)


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
        usual: `(batch, keys)`: λ where the configuration leaves it open; None where it does not.
        waits: `(batch, keys)` bool, where turns of a conversation said things of several kinds: True where only queries out of
            which a token is generated look there. None where the kind that was said last decides for all.
    """

    values: Tensor
    group: Tensor
    groups: int | None = None
    usual: Tensor | None = None
    waits: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> TokenScores:
        """With other rows or fewer keys: the same done to all that it holds."""
        usual, waits = (None if own is None else change(own) for own in (self.usual, self.waits))
        return TokenScores(change(self.values), change(self.group), self.groups, usual, waits)

    def only(self, where: Tensor) -> TokenScores:
        """Of some keys, `(batch, keys)` bool: nothing is said of the others."""
        return replace(self, values=self.values * where, group=self.group.masked_fill(~where, -1), waits=None)

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
        share: of attention that the keys which score 1 shall have; `query` is then what multiplies the bias that it takes. None
            for a bias that is known.
    """

    query: Tensor
    key: Tensor
    share: float | None = None
    forms: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    key_forms: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
