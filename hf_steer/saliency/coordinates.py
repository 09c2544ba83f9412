"""Boxes, points and lines of any unit, checked, as paint: places in fractions of the sides, or in pixels where widths count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_steer.errors import SaliencyError
from hf_steer.saliency.checked import numbers, picture_size, several
from hf_steer.saliency.lines import Lines
from hf_steer.saliency.paint import Boxes, Points
from hf_steer.saliency.units import CHOICE, Size, extent, fitting, refuse_below_a_pixel, sides_in

DEFAULT_RADIUS_FRACTION = 1 / 16


def check_boxes(boxes: Any, image_size: Any, unit: str) -> Boxes:
    """Boxes as fractions of the sides; SaliencyError for one that is empty, reaches outside or is smaller than a pixel."""
    size = picture_size(image_size)
    width, height = sides_in(unit, size)
    fractions = []
    for left, top, right, bottom in several(boxes, 4, "box", "(left, top, right, bottom)"):
        noun = f"box {(left, top, right, bottom)}"
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            turned = left >= right or top >= bottom
            remedy = "" if turned else fitting([(left, top), (right, bottom)], unit, size)
            raise SaliencyError(
                f"{noun} is empty or outside {extent(unit, size)}; boxes are (left, top, right, bottom) in {unit} of the original "
                f"picture.{remedy}"
            )
        refuse_below_a_pixel(noun, (right - left, bottom - top), unit)
        fractions.append((left / width, top / height, right / width, bottom / height))
    return Boxes(tuple(fractions))


def check_points(points: Any, image_size: Any, radius_px: float | None, unit: str) -> Points:
    """Points as fractions of the sides, like a radius in pixels; SaliencyError for one outside."""
    size = picture_size(image_size)
    radius = max(size) * DEFAULT_RADIUS_FRACTION if radius_px is None else float(radius_px)
    if not (math.isfinite(radius) and radius > 0):
        raise SaliencyError(f"radius_px must be above 0; got {radius_px}.")
    width, height = sides_in(unit, size)
    fractions = [(x / width, y / height) for x, y in _inside(points, unit, size)]
    return Points(tuple(fractions), (radius / size[0], radius / size[1]))


def check_lines(points: Any, width: Any, image_size: Any, unit: str) -> Lines:
    """Lines in pixels; SaliencyError for one that leaves the picture, or a width that is below a pixel or above the picture's."""
    size = picture_size(image_size)
    sides = sides_in(unit, size)
    try:
        thick = float(width)
    except (TypeError, ValueError) as error:
        raise SaliencyError(f"the width of a line is a number; got {width!r}.") from error
    longer = max(sides)
    if not 0 < thick <= longer:
        raise SaliencyError(
            f"the width of a line must be above 0 and at most {longer:g}, the longer side of the picture in {unit}; got {thick:g}."
        )
    refuse_below_a_pixel("the width of a line", (thick, thick), unit)
    scale_x, scale_y = size[0] / sides[0], size[1] / sides[1]
    lines = [tuple((x * scale_x, y * scale_y) for x, y in _inside(line, unit, size)) for line in _several_lines(points)]
    return Lines(tuple(lines), thick * max(size) / longer, size)


def _inside(points: Any, unit: str, size: Size) -> Sequence[Sequence[float]]:
    """One or several `(x, y)`; SaliencyError for one outside a picture of `size` pixels, or for pixels that look like fractions."""
    width, height = sides_in(unit, size)
    found = several(points, 2, "point", "(x, y)")
    for x, y in found:
        if not (0 <= x <= width and 0 <= y <= height):
            raise SaliencyError(f"point ({x:g}, {y:g}) is outside {extent(unit, size)}.{fitting([(x, y)], unit, size)}")
    if unit == "pixels" and all(x <= 1 and y <= 1 for x, y in found) and any(value % 1 for point in found for value in point):
        raise SaliencyError(
            f"all points {[tuple(point) for point in found]} lie within the first pixel, which cannot be told from fractions. Say "
            f"what they are counted in: {CHOICE}."
        )
    return found


def _several_lines(lines: Any) -> Sequence[Any]:
    """One line, or several: a point is one of two numbers, a line one of points."""
    given = numbers(lines.tolist() if isinstance(lines, np.ndarray) else lines)
    try:
        return list(given) if isinstance(given[0][0], Sequence) else [given]
    except (TypeError, IndexError, KeyError):
        return [given]
