"""What the user hands in, checked: sizes, maps and seconds; `coordinates` has boxes, points and lines, `masks` masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.saliency.paint import Picture, Stretches
from hf_steer.saliency.picture_files import is_picture, refuse_lying


def check_map(scores: Any) -> Picture:
    """A saliency map; SaliencyError for another shape, or negative values."""
    values = finite("map", scores)
    if values.numel() and values.min() < 0:
        raise SaliencyError(
            f"a saliency map must not be negative; got {values.min():g}. To turn the gaze away, use a negative strength."
        )
    return as_picture("map", values)


def check_stretches(spans: Any, duration_seconds: float | None) -> Stretches:
    """Stretches of time, those that overlap united; SaliencyError for one that is empty or outside the sound."""
    if duration_seconds is not None and not (math.isfinite(duration_seconds) and duration_seconds > 0):
        raise SaliencyError(f"duration_seconds must be above 0; got {duration_seconds}.")
    united: list[tuple[float, float]] = []
    for start, end in sorted((start, end) for start, end in several(spans, 2, "span", "(start, end) in seconds")):
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
    """Width and height in pixels; SaliencyError for anything else, or a PIL picture that is yet to be turned upright."""
    if is_picture(image_size):
        refuse_lying(image_size)
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


def as_picture(name: str, values: Tensor) -> Picture:
    """Two-dimensional values as paint; SaliencyError for another shape."""
    if values.ndim != 2 or not values.numel():
        raise SaliencyError(f"a {name} must have shape (height, width); got {tuple(values.shape)}.")
    return Picture(values)


def numbers(values: Any) -> Any:
    """Tensors of any dtype and device, alone or in sequences, as numbers."""
    if isinstance(values, Tensor):
        return values.tolist()
    return [numbers(own) for own in values] if isinstance(values, (list, tuple)) else values


def several(values: Any, length: int, noun: str, form: str) -> Sequence[Sequence[float]]:
    """One or several tuples of finite numbers."""
    try:
        table = torch.as_tensor(np.atleast_2d(np.array(numbers(values), dtype=np.float64)))
        table = table.view(len(table), length)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SaliencyError(f"a {noun} is {form}; got {values!r}.") from error
    if not len(table) or not torch.isfinite(table).all():
        raise SaliencyError(f"there must be at least one {noun}, and all must be finite; got {values!r}.")
    rows: list[list[float]] = table.tolist()
    return rows
