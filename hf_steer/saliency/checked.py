"""What the user hands in, checked: pixels become fractions of the sides, and everything becomes paint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.saliency.paint import Boxes, Picture, Points, Stretches

DEFAULT_RADIUS_FRACTION = 1 / 16


def check_boxes(boxes: Any, image_size: Any) -> Boxes:
    """Boxes in pixels as fractions of the sides; SaliencyError for one that is empty or reaches outside."""
    width, height = picture_size(image_size)
    fractions = []
    for left, top, right, bottom in _several(boxes, 4, "box", "(left, top, right, bottom)"):
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise SaliencyError(
                f"box {(left, top, right, bottom)} is empty or outside the picture of {width:g} x {height:g} pixels; boxes are "
                "(left, top, right, bottom) in pixels of the original picture."
            )
        fractions.append((left / width, top / height, right / width, bottom / height))
    return Boxes(tuple(fractions))


def check_points(points: Any, image_size: Any, radius_px: float | None) -> Points:
    """Points and radius in pixels as fractions of the sides; SaliencyError for one outside."""
    width, height = picture_size(image_size)
    radius = max(width, height) * DEFAULT_RADIUS_FRACTION if radius_px is None else float(radius_px)
    if not (math.isfinite(radius) and radius > 0):
        raise SaliencyError(f"radius_px must be above 0; got {radius_px}.")
    fractions = []
    for x, y in _several(points, 2, "point", "(x, y)"):
        if not (0 <= x <= width and 0 <= y <= height):
            raise SaliencyError(f"point ({x:g}, {y:g}) is outside the picture of {width:g} x {height:g} pixels.")
        fractions.append((x / width, y / height))
    return Points(tuple(fractions), (radius / width, radius / height))


def check_mask(mask: Any) -> Picture:
    """A mask; SaliencyError for another shape, or values that are not in [0, 1]."""
    values = finite("mask", mask)
    if values.numel() and (values.min() < 0 or values.max() > 1):
        raise SaliencyError(
            f"a mask must lie in [0, 1]; got {values.min():g} to {values.max():g}. For other scores use from_map."
        )
    return _picture("mask", values)


def check_map(scores: Any) -> Picture:
    """A saliency map; SaliencyError for another shape, or negative values."""
    values = finite("map", scores)
    if values.numel() and values.min() < 0:
        raise SaliencyError(
            f"a saliency map must not be negative; got {values.min():g}. To turn the gaze away, use a negative strength."
        )
    return _picture("map", values)


def check_stretches(spans: Any, duration_seconds: float | None) -> Stretches:
    """Stretches of time, those that overlap united; SaliencyError for one that is empty or outside the sound."""
    if duration_seconds is not None and not (math.isfinite(duration_seconds) and duration_seconds > 0):
        raise SaliencyError(f"duration_seconds must be above 0; got {duration_seconds}.")
    united: list[tuple[float, float]] = []
    for start, end in sorted((start, end) for start, end in _several(spans, 2, "span", "(start, end) in seconds")):
        if not 0 <= start < end <= (math.inf if duration_seconds is None else duration_seconds):
            until = "" if duration_seconds is None else f" of {duration_seconds:g} s"
            raise SaliencyError(
                f"span ({start:g}, {end:g}) is empty, negative or outside the sound{until}; spans are (start, end) in seconds."
            )
        if united and start <= united[-1][1]:
            before = united.pop()
            start, end = before[0], max(before[1], end)
        united.append((start, end))
    return Stretches(tuple(united), duration_seconds)


def picture_size(image_size: Any) -> tuple[float, float]:
    """Width and height; SaliencyError for anything else."""
    size = getattr(image_size, "size", None)
    try:
        width, height = size if isinstance(size, tuple) else image_size
        sides = float(width), float(height)
    except (TypeError, ValueError) as error:
        raise SaliencyError(f"image_size must be (width, height) in pixels or a PIL picture; got {image_size!r}.") from error
    if not (sides[0] > 0 and sides[1] > 0):
        raise SaliencyError(f"image_size must be (width, height) in pixels, both above 0; got {sides}.")
    return sides


def finite(name: str, values: Any) -> Tensor:
    """The values as float32; SaliencyError for NaN or infinity."""
    given = values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    tensor = given.to(torch.float32, copy=True)  # a statement does not change with the caller's buffer
    if not torch.isfinite(tensor).all():
        raise SaliencyError(f"{name} must be finite; {int((~torch.isfinite(tensor)).sum())} values are NaN or infinite.")
    return tensor


def _picture(name: str, values: Tensor) -> Picture:
    if values.ndim != 2 or not values.numel():
        raise SaliencyError(f"a {name} must have shape (height, width); got {tuple(values.shape)}.")
    return Picture(values)


def _numbers(values: Any) -> Any:
    """Tensors of any dtype and device, alone or in sequences, as numbers."""
    if isinstance(values, Tensor):
        return values.tolist()
    return [_numbers(own) for own in values] if isinstance(values, (list, tuple)) else values


def _several(values: Any, length: int, noun: str, form: str) -> Sequence[Sequence[float]]:
    """One or several tuples of finite numbers."""
    try:
        table = torch.as_tensor(np.atleast_2d(np.array(_numbers(values), dtype=np.float64)))
        table = table.view(len(table), length)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SaliencyError(f"a {noun} is {form}; got {values!r}.") from error
    if not len(table) or not torch.isfinite(table).all():
        raise SaliencyError(f"there must be at least one {noun}, and all must be finite; got {values!r}.")
    rows: list[list[float]] = table.tolist()
    return rows
