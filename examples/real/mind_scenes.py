"""Scenes of named pictures: one thing somewhere, or four in two by two cells, each with a box and a name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE_PX = 96
"""Of a scene; a cell of the four has half of it."""
SPLITS = ("training", "choosing", "report")
"""Four names that stand together in one split stand together in no other."""


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        pixels: (side, side, 3) bytes.
        names: indices of the names, in reading order.
        boxes: left, top, right, bottom of each cell, in pixels: where a user would draw.
        drawn: of each thing itself.
    """

    pixels: np.ndarray
    names: tuple[int, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    drawn: tuple[tuple[int, int, int, int], ...]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


def split_of(names: Sequence[int]) -> str:
    """Three fifths of all sets of names are for training, one for choosing, one for the report."""
    digest = hashlib.sha256(" ".join(map(str, sorted(names))).encode()).digest()[0] % 5
    return SPLITS[max(0, digest - 2)]


class Painter:
    """Paints scenes from the pictures of some artists.

    Args:
        pictures: (artists, names, height, width, 4) bytes.
        seed: of everything that is drawn by lot.
    """

    def __init__(self, pictures: np.ndarray, seed: int) -> None:
        self.pictures, self.random = pictures, np.random.default_rng(seed)
        self._sized: dict[tuple[int, int, int], np.ndarray] = {}

    def one(self) -> Scene:
        """A single thing, of any size, anywhere."""
        name, size = int(self.random.integers(self.pictures.shape[1])), int(self.random.integers(32, SIDE_PX + 1))
        pixels = self._ground()
        drawn = self._paint(pixels, name, size, (0, 0), SIDE_PX)
        return Scene(pixels.astype(np.uint8), (name,), ((0, 0, SIDE_PX, SIDE_PX),), (drawn,))

    def four(self, split: str) -> Scene:
        """Four things that stand together in this split alone."""
        while True:
            names = tuple(map(int, self.random.choice(self.pictures.shape[1], 4, replace=False)))
            if split_of(names) == split:
                break
        pixels, half = self._ground(), SIDE_PX // 2
        corners = [(0, 0), (half, 0), (0, half), (half, half)]
        drawn = tuple(
            self._paint(pixels, name, int(self.random.integers(32, half + 1)), corner, half)
            for name, corner in zip(names, corners, strict=True)
        )
        return Scene(pixels.astype(np.uint8), names, tuple((x, y, x + half, y + half) for x, y in corners), drawn)

    def _ground(self) -> np.ndarray:
        """A colour that runs into another one, downwards."""
        above, below = self.random.uniform(0, 255, (2, 1, 1, 3))
        share = np.linspace(0, 1, SIDE_PX)[:, None, None]
        return np.broadcast_to(above * (1 - share) + below * share, (SIDE_PX, SIDE_PX, 3)).astype(np.float32).copy()

    def _paint(self, pixels: np.ndarray, name: int, size: int, corner: tuple[int, int], room: int) -> tuple[int, int, int, int]:
        x, y = (int(start + self.random.integers(0, room - size + 1)) for start in corner)
        shown = self._picture(int(self.random.integers(self.pictures.shape[0])), name, size)
        place = pixels[y : y + size, x : x + size]
        place += (shown[..., :3] - place) * shown[..., 3:]
        return x, y, x + size, y + size

    def _picture(self, artist: int, name: int, size: int) -> np.ndarray:
        """Colours from 0 to 255 and an alpha from 0 to 1; sizes are kept, in steps of one pixel."""
        key = artist, name, size
        if key not in self._sized:
            image = Image.fromarray(self.pictures[artist, name]).resize((size, size), Image.Resampling.BILINEAR)
            self._sized[key] = np.asarray(image, dtype=np.float32) * np.float32([1, 1, 1, 1 / 255])
        return self._sized[key]
