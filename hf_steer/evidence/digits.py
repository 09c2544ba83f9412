"""Grids of real handwritten digits, and questions about them: the small world of the embedded model.

The pictures are scikit-learn's (1797 digits of 8 x 8 pixels, from the UCI repository). They are split into training and
held-out pictures before anything is drawn, so that no held-out stroke is ever trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from hf_steer.analysis.prompts import messages_for as messages_for
from hf_steer.errors import SteerError

CELL_PX = 28
DIGIT_PX = 24
HELD_OUT_FRACTION = 0.25
SPLIT_SEED = 20_260_215
PLACES: Mapping[tuple[int, int], tuple[str, ...]] = MappingProxyType(
    {
        (2, 2): ("top left", "top right", "bottom left", "bottom right"),
        (1, 2): ("left", "right"),
        (2, 1): ("top", "bottom"),
    }
)
"""Rows and columns of a grid -> names of its cells."""
OPEN_QUESTIONS = (
    "Which digit is it?",
    "What digit do you see?",
    "Read the digit.",
    "Name the digit in the picture.",
)
PLACE_QUESTIONS = ("Which digit is at the {place}?", "Read the digit at the {place}.", "What is at the {place}?")


@dataclass(frozen=True)
class Digits:
    """Pictures `(n, 8, 8)` with ink from 0 to 1, and their labels `(n,)`."""

    pictures: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scene:
    """A picture of a grid of digits.

    Attributes:
        image: the picture.
        labels: the digits, row by row.
        boxes: `(left, top, right, bottom)` of each cell in pixels.
    """

    image: Image.Image
    labels: tuple[int, ...]
    boxes: tuple[tuple[int, int, int, int], ...]


def load_digits(part: str) -> Digits:
    """The `"training"` or the `"held-out"` pictures.

    Raises:
        SteerError: scikit-learn, whose package carries the pictures, is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise SteerError("the digits come with scikit-learn; install it with: pip install 'hf-steer[demo]'") from error
    pictures, labels = load(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    held_out = int(len(labels) * HELD_OUT_FRACTION)
    chosen = {"held-out": order[:held_out], "training": order[held_out:]}[part]
    return Digits(pictures[chosen].reshape(-1, 8, 8) / 16, labels[chosen])


def draw_digit(picture: np.ndarray[Any, Any], *, size_px: int = DIGIT_PX, degrees: float = 0.0) -> Image.Image:
    """One digit, dark ink on white paper."""
    paper = Image.fromarray((255 * (1 - picture)).astype(np.uint8))
    large = paper.resize((size_px, size_px), Image.Resampling.BICUBIC)
    return large.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=255) if degrees else large


def draw_scene(digits: Digits, members: Sequence[int], *, columns: int = 2) -> Scene:
    """A grid of digits, cell by cell, each in the middle of its cell."""
    rows = -(-len(members) // columns)
    image = Image.new("RGB", (columns * CELL_PX, rows * CELL_PX), "white")
    margin = (CELL_PX - DIGIT_PX) // 2
    boxes = []
    for cell, member in enumerate(members):
        left, top = cell % columns * CELL_PX, cell // columns * CELL_PX
        image.paste(draw_digit(digits.pictures[member]).convert("RGB"), (left + margin, top + margin))
        boxes.append((left, top, left + CELL_PX, top + CELL_PX))
    return Scene(image, tuple(int(digits.labels[member]) for member in members), tuple(boxes))


def sample_scenes(digits: Digits, count: int, *, seed: int, cells: int = 4) -> list[Scene]:
    """Scenes of 2 x 2 cells with all labels different, so that an answer names exactly one cell."""
    generator = np.random.default_rng(seed)
    by_label = [np.flatnonzero(digits.labels == label) for label in range(10)]
    scenes = []
    for _ in range(count):
        labels = generator.permutation(10)[:cells]
        scenes.append(draw_scene(digits, [int(generator.choice(by_label[label])) for label in labels]))
    return scenes
