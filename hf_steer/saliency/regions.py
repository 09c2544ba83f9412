"""What is said of one picture, video or sound, and how several such statements combine, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.saliency.films import Film
from hf_steer.saliency.paint import Paint, Stretches
from hf_steer.values import Layout, Span


@dataclass(frozen=True)
class Region:
    """A painting on one picture, video or sound.

    Attributes:
        paint: what is painted.
        row: batch row.
        modality: `"image"`, `"video"` or `"audio"`.
        index: which one of that row.
        frames: first and last (excluded) of a video's sampled frames; all when None.
        size: `(width, height)` that the user gave the picture; None for a sound.
        weight: factor on its scores.
    """

    paint: Paint | Stretches | Film
    row: int
    modality: str
    index: int
    frames: tuple[int, int] | None = None
    size: tuple[float, float] | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Joint:
    """Two sums of terms that hold together: where nothing is said by one of them, nothing is said.

    Attributes:
        operation: a key of `OPERATIONS`.
        left: terms that are summed.
        right: likewise.
        weight: factor on the result.
    """

    operation: str
    left: tuple[Term, ...]
    right: tuple[Term, ...]
    weight: float = 1.0


Term: TypeAlias = "Region | Joint"

OPERATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"sum": torch.add, "product": torch.mul, "least": torch.minimum}
)


def regions_of(terms: Sequence[Term]) -> tuple[Region, ...]:
    """All regions of some terms, from left to right."""
    found: list[Region] = []
    for term in terms:
        found += [term] if isinstance(term, Region) else regions_of((*term.left, *term.right))
    return tuple(found)


def moved(term: Term, row: int) -> Term:
    """The same said of another batch row."""
    if isinstance(term, Region):
        return replace(term, row=row)
    left, right = (tuple(moved(part, row) for part in side) for side in (term.left, term.right))
    return replace(term, left=left, right=right)


def said_of(span: Span, terms: Sequence[Term], temporal_patch_size: int) -> Tensor | None:
    """What terms say together of one picture, video or sound.

    Args:
        span: its tokens.
        terms: to be summed.
        temporal_patch_size: video frames per grid step.

    Returns:
        `(tokens,)` scores; None where nothing is said.

    Raises:
        SaliencyError: frames or seconds past the end, a size or length that the model's inputs contradict, or something that
            lies where no token looks.
    """
    result: Tensor | None = None
    for term in terms:
        value: Tensor | None = None
        if isinstance(term, Joint):
            left, right = (said_of(span, side, temporal_patch_size) for side in (term.left, term.right))
            value = None if left is None or right is None else OPERATIONS[term.operation](left, right)
        elif (term.row, term.modality, term.index) == (span.row, span.modality, span.index):
            value = paint_region(term, span.layout, temporal_patch_size)
        if value is not None:
            value = value * term.weight
            result = value if result is None else result + value
    return result


def paint_region(region: Region, layout: Layout, temporal_patch_size: int) -> Tensor:
    """A region's scores on the tokens of its picture, video or sound, before its weight: `(tokens,)` float32.

    Tokens without a place have 0. For arguments and errors see `said_of`.
    """
    if isinstance(region.paint, Stretches):
        return _on_sound(region, region.paint, layout)
    _refuse_other_aspect(region, layout)
    if layout.fit is not None:
        layout = layout.at(region.size)
    if isinstance(region.paint, Film):
        return _on_frames(region, region.paint, layout, temporal_patch_size)
    if layout.cells is None:
        assert layout.grid is not None
        painted = region.paint.on_grid(*layout.grid[1:]).flatten().repeat(layout.frames)
    else:
        painted = _on_cells(region, region.paint, layout)
    if region.frames is not None:
        sampled = layout.frames * temporal_patch_size
        first, last = region.frames
        if last > sampled:
            raise SaliencyError(f"frames={region.frames} reach past the video's {sampled} sampled frames.")
        per_step = layout.tokens // layout.frames  # a newline at the end is 0 already
        painted[: first // temporal_patch_size * per_step] = 0
        painted[-(-last // temporal_patch_size) * per_step :] = 0
    return painted


def _on_frames(region: Region, film: Film, layout: Layout, temporal_patch_size: int) -> Tensor:
    """Step by step; a newline at the end is 0."""
    per_step = layout.tokens // layout.frames
    painted = torch.zeros(layout.tokens, dtype=torch.float32)
    for step, picture in enumerate(film.on_steps(layout.frames, temporal_patch_size)):
        own = slice(step * per_step, (step + 1) * per_step)
        if layout.cells is None:
            assert layout.grid is not None
            painted[own] = picture.on_grid(*layout.grid[1:]).flatten()
        else:
            painted[own] = _on_cells(region, picture, replace(layout, cells=layout.cells[own]))
    return painted


def _on_cells(region: Region, paint: Paint, layout: Layout) -> Tensor:
    assert layout.cells is not None
    cells = layout.cells
    placed = ~torch.isnan(cells).any(1)
    shown = torch.cat([cells[placed, :2].amin(0), cells[placed, 2:].amax(0)])
    if paint.misses(shown):
        left, top, right, bottom = (100 * shown).tolist()
        raise SaliencyError(
            f"what is said of {region.modality} {region.index} in row {region.row} lies where no token looks: of its width the "
            f"model sees {left:.1f} to {right:.1f} %, of its height {top:.1f} to {bottom:.1f} %. Look inside, or hand the "
            "processor a picture of the shape that it does not cut."
        )
    painted = torch.zeros(len(cells), dtype=torch.float32)
    painted[placed] = paint.on_cells(cells[placed])
    return painted


def _on_sound(region: Region, paint: Stretches, layout: Layout) -> Tensor:
    assert layout.cells is not None
    assert layout.size is not None
    placed = ~torch.isnan(layout.cells).any(1)
    name, heard, end = f"audio {region.index} in row {region.row}", layout.size[0], float(layout.cells[placed][-1, 1])
    token = end / int(placed.sum())
    if paint.duration is not None and abs(paint.duration - heard) > layout.slack + token:
        raise SaliencyError(
            f"duration_seconds={paint.duration:g} was said of {name}, but the model hears {heard:g} s of it. Give the length of "
            "the sound itself, without padding, and check row= and sound=."
        )
    for span in paint.spans:
        if span[1] > heard + 1e-6:  # the user's seconds may be rounded
            raise SaliencyError(f"span ({span[0]:g}, {span[1]:g}) reaches past {name}, of which the model hears {heard:g} s.")
        if span[0] >= end and not layout.continues:  # what is left over after the last whole token
            raise SaliencyError(f"span ({span[0]:g}, {span[1]:g}) lies after the last token of {name}, which ends at {end:g} s.")
    painted = torch.zeros(layout.tokens, dtype=torch.float32)
    painted[placed] = paint.on_cells(layout.cells[placed])
    return painted


def _refuse_other_aspect(region: Region, layout: Layout) -> None:
    if layout.size is None or region.size is None or _has_shape_of(region.size, layout):
        return
    (width, height), (own_width, own_height), slack = region.size, layout.size, layout.slack
    least, most = _ratio(own_width - slack, own_height + slack), _ratio(own_width + slack, own_height - slack)
    allowed = f"{least:.3g}" if slack == 0 else f"between {least:.3g} and {most:.3g}"
    turned = (
        " It would fit on its side: was the model shown the picture without the turn that its EXIF tag asks for? Then give the "
        "processor PIL.ImageOps.exif_transpose(picture)."
    )
    raise SaliencyError(
        f"{region.modality} {region.index} in row {region.row} was said to have {width:g} x {height:g} pixels, a ratio of "
        f"{width / height:.3g}; the model's inputs say {allowed}. Give image_size=(width, height) of the original picture, "
        f"also for a mask or map of another shape.{turned if _has_shape_of((height, width), layout) else ''}"
    )


def _has_shape_of(size: tuple[float, float], layout: Layout) -> bool:
    """Whether a picture of this size can be the one that a layout knows, as far as rounding lets it."""
    assert layout.size is not None
    (width, height), (own_width, own_height), slack = size, layout.size, layout.slack
    least, most = _ratio(own_width - slack, own_height + slack), _ratio(own_width + slack, own_height - slack)
    # whole pixels may be one off; in a picture that was enlarged so was what a resizing before that had rounded; so are coarse maps
    off = max(1.0, slack / 2) if width * height < own_width * own_height else 1.0
    return _ratio(width + off, height - off) >= least and _ratio(width - off, height + off) <= most


def _ratio(width: float, height: float) -> float:
    """Width to height, 0 or infinite where rounding may have taken a whole side."""
    return max(width, 0.0) / height if height > 0 else math.inf
