"""How transformers' processors cut a picture into tiles, and how many tokens each tile becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hf_steer.ground.parts import Anatomy
from hf_steer.ground.pictures import Square, vision_of
from hf_steer.ground.settings import has_setting, setting, side_of

Sides = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Canvas:
    """What tiles of one size cover, side by side.

    Attributes:
        rows: of tiles.
        columns: of tiles.
        height: share of it that the picture fills, from the top; the rest is padding.
        width: likewise, from the left.
    """

    rows: int
    columns: int
    height: float = 1.0
    width: float = 1.0


def tokens_in_square(anatomy: Anatomy) -> Square:
    """The square that a tower sees, in prompt tokens instead of patches: several patches a side become one token."""
    config, vision = anatomy.root.config, vision_of(anatomy)
    if not has_setting(vision, "patch_px"):  # an eye without patches
        return Square(math.isqrt(int(setting(config, "tokens_in_square"))), 1)
    side, patch = side_of(vision, "side_px"), side_of(vision, "patch_px")
    if has_setting(config, "tokens_in_square"):
        return Square(side, patch * (side // patch // math.isqrt(int(setting(config, "tokens_in_square")))))
    return Square(side, patch * patches_a_token(anatomy))


def patches_a_token(anatomy: Anatomy) -> int:
    """How many patches become one token, along a side."""
    for owner in (anatomy.root.config, vision_of(anatomy)):
        if has_setting(owner, "patches_joined"):
            return int(setting(owner, "patches_joined"))
        if has_setting(owner, "patches_shrunk"):
            return round(1 / float(setting(owner, "patches_shrunk")))
    return 1


def nearest_ratio(size: Sides, side_px: int, tiles: int) -> Canvas | None:
    """Of all canvases with so many tiles the one nearest to the picture's ratio (InternVL, Aya Vision); None where one with
    fewer tiles is nearer, so that the picture is another.
    """
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    height, width = size
    columns, rows = get_optimal_tiled_canvas(size, (side_px, side_px), tiles, tiles)
    nearest = get_optimal_tiled_canvas(size, (side_px, side_px), 1, tiles)
    slack = (width / height) * (1 / width + 1 / height)  # sides may be off by a pixel each, such as a coarse mask's
    off, least = (abs(width / height - across / down) for across, down in ((columns, rows), nearest))
    return Canvas(rows, columns) if off <= least + slack else None


def least_enlarged(size: Sides, side_px: int, tiles: int) -> Canvas | None:
    """The canvas onto which the picture is squashed with the least enlarging (Command A Vision)."""
    from transformers.models.cohere2_vision.image_processing_cohere2_vision import get_optimal_tiled_canvas

    columns, rows = (int(side) for side in get_optimal_tiled_canvas(size, (side_px, side_px), 1, tiles))
    return Canvas(rows, columns) if rows * columns == tiles else None


def least_padded(size: Sides, side_px: int, tiles: int) -> Canvas | None:
    """The canvas into whose top left corner the picture fits best (Llama 4)."""
    from transformers.image_utils import SizeDict
    from transformers.models.llama4 import image_processing_llama4 as llama4

    resolutions = llama4.find_supported_resolutions(max_num_chunks=tiles, patch_size=SizeDict(height=side_px, width=side_px))
    height, width = (int(side) for side in llama4.get_best_fit(size, torch.tensor(resolutions)))
    if height * width != tiles * side_px**2:
        return None
    most = (min(max(size[0], side_px), height), min(max(size[1], side_px), width))
    resized = llama4.get_max_res_without_distortion(size, most)
    shares = [max(length, 1) / whole for length, whole in zip(resized, (height, width), strict=True)]
    return Canvas(height // side_px, width // side_px, *shares)


def least_scaled(size: Sides, side_px: int, most: int) -> Canvas:
    """Of all canvases of at most so many tiles the one on which the picture, in its top left corner, is scaled least (Mllama)."""
    from transformers.models.mllama import image_processing_mllama as mllama

    canvas = [int(side) for side in mllama.get_optimal_tiled_canvas(*size, most, side_px)]
    resized = mllama.get_image_size_fit_to_canvas(size[0], size[1], canvas[0], canvas[1], side_px)
    shares = [int(length) / side for length, side in zip(resized, canvas, strict=True)]
    return Canvas(*(side // side_px for side in canvas), *shares)


def rounded_up(size: Sides, side_px: int, tiles: int) -> Canvas | None:
    """As many tiles along the longer side as there are, and along the shorter one as it needs (Idefics3, SmolVLM)."""
    height, width = size
    found: list[tuple[float, Canvas]] = []
    for rows in range(1, tiles + 1):
        columns, rest = divmod(tiles, rows)
        if rest or (columns < rows if width >= height else rows < columns):
            continue
        needed = columns * height / width if width >= height else rows * width / height
        shorter = rows if width >= height else columns
        off = max(shorter - 1 - needed, needed - shorter, 0.0)  # 0 where as many are needed as there are
        found.append((off, Canvas(rows, columns)))
    off, canvas = min(found, key=lambda own: own[0])
    # the processor rounds twice before it counts tiles, to a pixel or two of the resized picture; the user's sides may be rounded
    slack = max(canvas.rows, canvas.columns) / min(size) + 4 / side_px
    return canvas if off <= slack else None


def padded_up(size: Sides, tokens: Sides, token_px: int, patch_px: int) -> Canvas | None:
    """A canvas of whole tokens in whose top left corner the picture lies, made smaller where it has too many (Kimi-K2.5).

    Where the processor allows other numbers than it does by itself, the scale is known to within a token: the middle is taken.
    None for a picture that needs other tokens.
    """
    from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor, navit_resize

    canvas = [count * token_px for count in tokens]
    most, sides = Kimi_K25ImageProcessor.max_patches, Kimi_K25ImageProcessor.size["max_height"]
    resized: tuple[float, ...]
    # called as the processor calls it: that of 5.14 took the sides for each other, and squashed its pictures accordingly
    resized, padded = navit_resize(*size, patch_px, token_px // patch_px, most, sides)
    if list(padded) != canvas:
        largest = min(whole / length for whole, length in zip(canvas, size, strict=True))
        least = max((whole - token_px) / length for whole, length in zip(canvas, size, strict=True))
        if least > largest + 1 / min(size):  # sides are rounded down, and the user's may be rounded, too
            return None
        resized = tuple(min(length * (least + largest) / 2, whole) for whole, length in zip(canvas, size, strict=True))
    return Canvas(*tokens, *(length / whole for length, whole in zip(resized, canvas, strict=True)))
