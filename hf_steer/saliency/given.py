"""What the user says: "look here", as scores, stretches of text, boxes, masks, maps, points, scribbles, or seconds of a sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.saliency.checked import check_map, check_stretches, finite, picture_size
from hf_steer.saliency.coordinates import check_boxes, check_lines, check_points
from hf_steer.saliency.films import Film, FrameTimes, times_of
from hf_steer.saliency.masks import check_mask
from hf_steer.saliency.paint import Paint
from hf_steer.saliency.regions import Region
from hf_steer.saliency.statement import Statement
from hf_steer.saliency.text import char_scores, text_scores

Box = Sequence[float]


class Provider(Protocol):
    """Something that looks at pictures for another model."""

    def look(self, conversations: Sequence[Any]) -> Mapping[tuple[str, int, int], tuple[Tensor, tuple[int, int], FrameTimes]]:
        """`(modality, row, index)` -> maps `(frames, height, width)`, size of the original, when each of its maps is."""


@dataclass(frozen=True, eq=False)
class Saliency(Statement):
    """Where to look, or to listen; hand it to `use_saliency`. Build it with one of the `from_*` methods.

    Statements combine token by token, before they are normalised: `a + b` is both, `2.0 * a` twice as much, `a * b` the product and
    `a & b` the smaller of the two; on a picture or sound of which one of the two says nothing, these last two say nothing.

    Pixels are those of the original picture as people see it, before the processor resized, cut or padded it: x to the right, y
    down, from the top left. Where the model's inputs tell the shape of the picture, a statement about a picture of another shape is
    refused, and so is a PIL picture that its EXIF tag asks to turn: processors leave it lying.

    Boxes, points and lines are counted in pixels, or as `unit` says: `"fraction"` of the sides (0 to 1), or `"thousandths"` of them
    (0 to 1000, as Qwen answers). Something in pixels that is smaller than one is refused, since fractions look like it.
    """

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
        values = finite("scores", scores)
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
        return cls.from_tokens(char_scores(spans, offset_mapping, weights))

    @classmethod
    def from_text(
        cls, substrings: str | Sequence[str | Sequence[str]], tokenizer: Any, input_ids: Any, *, occurrence: int | None = None
    ) -> Saliency:
        """Stretches of the prompt's text, by what they read. A token that a stretch touches scores 1.

        The text is what `input_ids` decode to, special and padding tokens included; it is what the tokenizer saw after the
        processor put in its placeholders, so no offsets of the processor's are needed.

        Args:
            substrings: one for all rows; or one entry per row, a string or a list of strings (empty to say nothing there).
            tokenizer: that made `input_ids`, or the processor that holds it.
            input_ids: `(batch, tokens)` as the model gets them, or `(tokens,)` for one row.
            occurrence: which one, from 0, where a substring is there several times.

        Raises:
            SaliencyError: a substring that is not there, or several times without `occurrence`; entries for other rows; a
                tokenizer whose tokens do not decode one after the other.
        """
        return cls.from_tokens(text_scores(substrings, tokenizer, input_ids, occurrence))

    @classmethod
    def from_boxes(
        cls, boxes: Sequence[Box] | Box, image_size: Any, *, unit: str = "pixels", row: int = 0, image: int = 0,
        video: int | None = None, frames: tuple[int, int] | None = None,
    ) -> Saliency:  # fmt: skip
        """Boxes; each token scores the share of its area that they cover.

        Args:
            boxes: one or several `(left, top, right, bottom)`.
            image_size: `(width, height)` of the original picture, or the PIL picture itself. Its shape tells what a processor
                that cuts out the centre (LLaVA's with a CLIP tower) has taken away.
            unit: what the boxes are counted in: `"pixels"`, `"fraction"` or `"thousandths"`.
            row: batch row, as in `input_ids`.
            image: which picture of that row, from 0.
            video: which video of that row instead.
            frames: first and last (excluded) of the video's sampled frames; all when None.

        Raises:
            SaliencyError: a box that is empty, reaches outside the picture, or is smaller than a pixel when counted in them.
        """
        return cls._region(check_boxes(boxes, image_size, unit), image_size, row, image, video, frames)

    @classmethod
    def from_mask(
        cls, mask: Any, *, label: int | Sequence[int] | None = None, image_size: Any = None, row: int = 0, image: int = 0,
        video: int | None = None, frames: tuple[int, int] | None = None,
    ) -> Saliency:  # fmt: skip
        """A mask over the whole picture, at any resolution; averaged per token.

        Args:
            mask: `(height, width)`: bools, numbers in [0, 1], or 0 and 255; a PIL picture, or the path of one: mode `"1"`, `"L"`
                from black to white, `"P"` with two colours, or any with an alpha that varies, which then says where the mask is.
            label: of a map of labels (whole numbers, or a palette of more colours) the one or those that are meant.
            image_size: as in `from_boxes`, for a mask of another shape than the picture; None for one of the same.
            row: as in `from_boxes`, like `image`, `video` and `frames`.

        Raises:
            SaliencyError: not two-dimensional, NaN, below 0 or above 1, or values that may mean several things.
            FileError: a path that is no picture's.
        """
        paint = check_mask(mask, label)
        return cls._region(paint, _own_size(paint.values, image_size), row, image, video, frames)

    @classmethod
    def from_map(
        cls, scores: Any, *, image_size: Any = None, row: int = 0, image: int = 0, video: int | None = None,
        frames: tuple[int, int] | None = None,
    ) -> Saliency:  # fmt: skip
        """A saliency map over the whole picture, `(height, width)`, at least 0, at any resolution; otherwise as `from_mask`.

        Raises:
            SaliencyError: not two-dimensional, NaN, or negative.
        """
        paint = check_map(scores)
        return cls._region(paint, _own_size(paint.values, image_size), row, image, video, frames)

    @classmethod
    def from_points(
        cls, points: Sequence[Sequence[float]] | Sequence[float], image_size: Any, *, radius_px: float | None = None,
        unit: str = "pixels", row: int = 0, image: int = 0, video: int | None = None, frames: tuple[int, int] | None = None,
    ) -> Saliency:  # fmt: skip
        """Points, each a Gaussian spot.

        Args:
            points: one or several `(x, y)`.
            image_size: `(width, height)` of the original picture, or the PIL picture itself.
            radius_px: standard deviation of a spot; a sixteenth of the longer side when None. It is never narrower than
                half a token. In pixels whatever the unit.
            unit: as in `from_boxes`, like `row`, `image`, `video` and `frames`.

        Raises:
            SaliencyError: a point outside the picture, points in pixels that all lie in the first, a radius that is not above 0.
        """
        return cls._region(check_points(points, image_size, radius_px, unit), image_size, row, image, video, frames)

    @classmethod
    def from_scribble(
        cls, points: Sequence[Any], width: float, image_size: Any, *, unit: str = "pixels", row: int = 0, image: int = 0,
        video: int | None = None, frames: tuple[int, int] | None = None,
    ) -> Saliency:  # fmt: skip
        """Lines drawn by hand, with round ends; each token scores the share of its area that they cover together.

        Args:
            points: `(x, y)` along the line, or one such list per line. A line of one point is a dot.
            width: of the lines, in the unit of the points; a fraction, or thousandths, are of the picture's longer side.
            image_size: `(width, height)` of the original picture, or the PIL picture itself.
            unit: as in `from_boxes`, like `row`, `image`, `video` and `frames`.

        Raises:
            SaliencyError: a point outside the picture, a width that is not above 0, or smaller than a pixel when counted in them.
        """
        return cls._region(check_lines(points, width, image_size, unit), image_size, row, image, video, frames)

    @classmethod
    def from_seconds(
        cls, spans: Sequence[Sequence[float]] | Sequence[float], *, duration_seconds: float | None = None, row: int = 0,
        sound: int = 0,
    ) -> Saliency:  # fmt: skip
        """Stretches of a sound; each token scores the share of its time that they cover.

        Args:
            spans: one or several `(start, end)` in seconds.
            duration_seconds: of the sound, which Voxtral's inputs do not tell: without it spans may reach into the padding. The
                other families know it, and check it.
            row: batch row, as in `input_ids`.
            sound: which sound of that row, from 0.

        Raises:
            SaliencyError: a span that is empty, negative or outside the sound.
        """
        if row < 0 or sound < 0:
            raise SaliencyError(f"rows and sounds count from 0; got row={row}, sound={sound}.")
        return cls(terms=(Region(check_stretches(spans, duration_seconds), row, "audio", sound),))

    @classmethod
    def external(cls, provider: Provider, messages: Sequence[Any], *, video_metadata: Sequence[Any] | None = None) -> Saliency:
        """Another model's eyes: what a Qwen2-VL sees in the same pictures and videos, laid onto this model's tokens and crops.

        The two may have been shown different frames of a video; they are held together in time.

        Args:
            provider: an `hf_steer.SaliencyProvider`.
            messages: one conversation, or one per row of the batch, with the original pictures, in the form that
                `qwen_vl_utils.process_vision_info` takes. Rows and pictures are those of the steered model's prompt.
            video_metadata: which frames of each video the steered model was shown, row by row, as its processor returns it with
                `return_metadata=True`. None where both models' frames share each video evenly, however many they are.

        Raises:
            SaliencyError: no picture or video in the messages, a PIL picture that is yet to be turned upright, or metadata of
                another number of videos. That the steered model's pictures have the same shape, and its videos as many frames, is
                checked when it is called.
        """
        rows = list(messages) if messages and isinstance(messages[0], (list, tuple)) else [messages]
        seen = provider.look(rows)
        videos = sum(modality == "video" for modality, _, _ in seen)
        if video_metadata is not None and len(video_metadata) != videos:
            raise SaliencyError(
                f"video_metadata speaks of {len(video_metadata)} videos, and the messages hold {videos}. Give one entry per video, "
                "row by row, or none at all."
            )
        shown = iter([None] * videos if video_metadata is None else [times_of(own) for own in video_metadata])
        total = cls()
        for (modality, row, index), (maps, size, times) in seen.items():
            if modality == "video":
                film = Film(maps.detach().to("cpu", torch.float32), times, next(shown))
                total = total + cls(terms=(Region(film, row, modality, index, size=picture_size(size)),))
            else:
                total = total + cls.from_map(maps[0], image_size=size, row=row, image=index)
        return total

    @classmethod
    def _region(
        cls, paint: Paint, size: Any, row: int, image: int, video: int | None, frames: tuple[int, int] | None
    ) -> Saliency:
        modality, index = ("image", image) if video is None else ("video", video)
        if row < 0 or index < 0:
            raise SaliencyError(f"rows and pictures count from 0; got row={row}, {modality}={index}.")
        if frames is not None and (video is None or not 0 <= frames[0] < frames[1]):
            raise SaliencyError(f"frames={frames} must be (first, last excluded) of a video, with video=... saying which one.")
        return cls(terms=(Region(paint, row, modality, index, frames, picture_size(size)),))


def _own_size(values: Tensor, image_size: Any) -> Any:
    """A map's own `(width, height)` where no other is given."""
    return values.shape[::-1] if image_size is None else image_size
