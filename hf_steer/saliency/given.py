"""What the user says: "look here", as token scores, character spans, boxes, masks, maps or points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.saliency.paint import Boxes, Paint, Picture, Points, box_fractions, point_fractions

Box = Sequence[float]


@dataclass(frozen=True)
class Region:
    """A painting on one picture or video: which row, which one of that row, which of its frames."""

    paint: Paint
    row: int
    modality: str
    index: int
    frames: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Saliency:
    """Where to look; hand it to `use_saliency`. Build it with one of the `from_*` methods; `a + b` says both.

    Pixels are those of the original picture, before the processor resized it: x to the right, y down, from the top left.
    """

    tokens: Tensor | None = None
    regions: tuple[Region, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Saliency:
        """Itself: it is frozen, and a copied cache still carries the same statement."""
        return self

    @classmethod
    def from_tokens(cls, scores: Any) -> Saliency:
        """One score per prompt token, padding included.

        Args:
            scores: `(batch, prompt tokens)`, or `(prompt tokens,)` for one row: real numbers, 0 where nothing is said.
                Used as given with `normalize="none"`; otherwise scaled over the row's real tokens. On a reused cache
                either the whole conversation or only the new tokens.

        Raises:
            SaliencyError: wrong number of dimensions, NaN or infinite.
        """
        values = _finite("scores", scores)
        values = values[None] if values.ndim == 1 else values
        if values.ndim != 2 or not values.numel():
            raise SaliencyError(f"from_tokens takes (batch, prompt tokens); got shape {tuple(values.shape)}.")
        return cls(tokens=values)

    @classmethod
    def from_char_spans(
        cls, spans: Sequence[Sequence[tuple[int, int]]], offset_mapping: Any, *, weights: Sequence[float] | None = None
    ) -> Saliency:
        """Stretches of the prompt's text, by character.

        Args:
            spans: per row, `(start, end)` characters, end excluded.
            offset_mapping: `(batch, tokens, 2)` as the tokenizer returns it with `return_offsets_mapping=True` in the
                call that made `input_ids`, padding included.
            weights: one per span number, the same in all rows; 1 for all when None.

        Raises:
            SaliencyError: a row without its spans, an empty span, or one outside the text.
        """
        offsets = torch.as_tensor(np.asarray(offset_mapping))
        if offsets.ndim != 3 or offsets.shape[-1] != 2:
            raise SaliencyError(
                f"offset_mapping must have shape (batch, tokens, 2); got {tuple(offsets.shape)}. "
                "Call the tokenizer with a list of prompts and return_offsets_mapping=True."
            )
        if len(spans) != len(offsets):
            raise SaliencyError(f"{len(spans)} rows of spans for {len(offsets)} rows of tokens; give one list per row.")
        scores = torch.zeros(offsets.shape[:2])
        for row, (row_spans, pairs) in enumerate(zip(spans, offsets, strict=True)):
            start_of, end_of = pairs[:, 0], pairs[:, 1]
            for number, (start, end) in enumerate(row_spans):
                if not 0 <= start < end <= int(end_of.max()):
                    raise SaliencyError(
                        f"row {row}: characters {start} to {end} are empty or outside its text of {int(end_of.max())} "
                        "characters; spans are (start, end) with the end excluded."
                    )
                weight = 1.0 if weights is None else float(weights[number])
                scores[row, (start_of < end) & (end_of > start)] = weight
        return cls.from_tokens(scores)

    @classmethod
    def from_boxes(
        cls,
        boxes: Sequence[Box] | Box,
        image_size: Any,
        *,
        row: int = 0,
        image: int = 0,
        video: int | None = None,
        frames: tuple[int, int] | None = None,
    ) -> Saliency:
        """Boxes in pixels of the original picture; each token scores the share of its area that they cover.

        Args:
            boxes: one or several `(left, top, right, bottom)`.
            image_size: `(width, height)` of the original picture, or the PIL picture itself.
            row: batch row, as in `input_ids`.
            image: which picture of that row, from 0.
            video: which video of that row instead.
            frames: first and last (excluded) of the video's sampled frames; all when None.

        Raises:
            SaliencyError: a box that is empty or reaches outside the picture.
        """
        return cls._region(Boxes(box_fractions(boxes, image_size)), row, image, video, frames)

    @classmethod
    def from_mask(
        cls, mask: Any, *, row: int = 0, image: int = 0, video: int | None = None, frames: tuple[int, int] | None = None
    ) -> Saliency:
        """A mask over the whole picture, `(height, width)`, bool or in [0, 1], at any resolution; averaged per token.

        Raises:
            SaliencyError: not two-dimensional, NaN, below 0 or above 1.
        """
        values = _finite("mask", mask)
        if values.numel() and (values.min() < 0 or values.max() > 1):
            raise SaliencyError(
                f"a mask must lie in [0, 1]; got {values.min():g} to {values.max():g}. For other scores use from_map."
            )
        return cls._region(Picture(_flat("mask", values)), row, image, video, frames)

    @classmethod
    def from_map(
        cls, scores: Any, *, row: int = 0, image: int = 0, video: int | None = None, frames: tuple[int, int] | None = None
    ) -> Saliency:
        """A saliency map over the whole picture, `(height, width)`, at least 0, at any resolution.

        Raises:
            SaliencyError: not two-dimensional, NaN, or negative.
        """
        values = _finite("map", scores)
        if values.numel() and values.min() < 0:
            raise SaliencyError(
                f"a saliency map must not be negative; got {values.min():g}. To turn the gaze away, use a negative strength."
            )
        return cls._region(Picture(_flat("map", values)), row, image, video, frames)

    @classmethod
    def from_points(
        cls,
        points: Sequence[Sequence[float]] | Sequence[float],
        image_size: Any,
        *,
        radius_px: float | None = None,
        row: int = 0,
        image: int = 0,
        video: int | None = None,
        frames: tuple[int, int] | None = None,
    ) -> Saliency:
        """Points in pixels of the original picture, each a Gaussian spot.

        Args:
            points: one or several `(x, y)`.
            image_size: `(width, height)` of the original picture, or the PIL picture itself.
            radius_px: standard deviation of a spot; a sixteenth of the longer side when None. It is never narrower than
                half a token.
            row: batch row, as in `input_ids`.
            image: which picture of that row, from 0.
            video: which video of that row instead.
            frames: first and last (excluded) of the video's sampled frames; all when None.

        Raises:
            SaliencyError: a point outside the picture, a radius that is not above 0.
        """
        paint = Points(*point_fractions(points, image_size, radius_px))
        return cls._region(paint, row, image, video, frames)

    def __add__(self, other: Saliency) -> Saliency:
        """Both statements: regions add up where they overlap; token scores add token by token."""
        if not isinstance(other, Saliency):
            return NotImplemented
        if (self.tokens is None) != (other.tokens is None):
            raise SaliencyError("token scores and picture regions cannot be added; they are scaled over different tokens.")
        if self.tokens is None or other.tokens is None:
            return Saliency(regions=self.regions + other.regions)
        if self.tokens.shape != other.tokens.shape:
            shapes = f"{tuple(self.tokens.shape)} and {tuple(other.tokens.shape)}"
            raise SaliencyError(f"token scores of shapes {shapes} cannot be added; both are (batch, prompt tokens).")
        return Saliency(tokens=self.tokens + other.tokens)

    @classmethod
    def _region(
        cls, paint: Paint, row: int, image: int, video: int | None, frames: tuple[int, int] | None
    ) -> Saliency:
        modality, index = ("image", image) if video is None else ("video", video)
        if row < 0 or index < 0:
            raise SaliencyError(f"rows and pictures count from 0; got row={row}, {modality}={index}.")
        if frames is not None and (video is None or not 0 <= frames[0] < frames[1]):
            raise SaliencyError(
                f"frames={frames} must be (first, last excluded) of a video, with video=... saying which one."
            )
        return cls(regions=(Region(paint, row, modality, index, frames),))


def _finite(name: str, values: Any) -> Tensor:
    tensor = torch.as_tensor(values.detach() if isinstance(values, Tensor) else np.asarray(values))
    tensor = tensor.to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise SaliencyError(f"{name} must be finite; {int((~torch.isfinite(tensor)).sum())} values are NaN or infinite.")
    return tensor


def _flat(name: str, values: Tensor) -> Tensor:
    if values.ndim != 2 or not values.numel():
        raise SaliencyError(f"a {name} must have shape (height, width); got {tuple(values.shape)}.")
    return values
