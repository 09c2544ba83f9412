"""In what a picture's coordinates are counted: its pixels, fractions of its sides, or the thousandths in which Qwen answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from hf_steer.errors import SaliencyError

Size = tuple[float, float]

UNITS: Mapping[str, float | None] = MappingProxyType({"pixels": None, "fraction": 1.0, "thousandths": 1000.0})
"""Unit -> how long it counts either side of the picture; None for as long as it is."""

CHOICE = 'unit="pixels" (of the original picture), "fraction" (0 to 1 of its sides) or "thousandths" (0 to 1000, as Qwen answers)'
_ROUNDING = 1e-6
"""Half-precision boxes one pixel wide are one pixel wide."""


def sides_in(unit: str, size: Size) -> Size:
    """Width and height of a picture of so many pixels in a unit.

    Raises:
        SaliencyError: no such unit.
    """
    if not isinstance(unit, str) or unit not in UNITS:
        raise SaliencyError(f"unit={unit!r} is none; give {CHOICE}.")
    length = UNITS[unit]
    return size if length is None else (length, length)


def extent(unit: str, size: Size) -> str:
    """A picture of `size` pixels in words, as far as coordinates of a unit reach."""
    length = UNITS[unit]
    if length is None:
        return f"the picture of {size[0]:g} x {size[1]:g} pixels"
    return f"the picture, which goes from 0 to {length:g} in unit={unit!r}"


def refuse_below_a_pixel(noun: str, lengths: Size, unit: str) -> None:
    """SaliencyError for something in pixels that is smaller than one: nobody means that, and fractions look like it."""
    if unit == "pixels" and 0 < min(lengths) < 1 - _ROUNDING:
        raise SaliencyError(
            f"{noun} is {lengths[0]:g} x {lengths[1]:g} pixels, and less than one cannot be told from fractions. Say what it is "
            f"counted in: {CHOICE}."
        )


def fitting(corners: Sequence[Size], unit: str, size: Size) -> str:
    """A remedy: the other units in which points outside a picture of `size` pixels would lie inside; nothing if there is none."""
    others = []
    for other in (other for other in UNITS if other != unit):
        width, height = sides_in(other, size)
        if all(0 <= x <= width and 0 <= y <= height for x, y in corners):
            others.append(repr(other))
    return f" It would fit with unit={' or '.join(others)}." if others else ""
