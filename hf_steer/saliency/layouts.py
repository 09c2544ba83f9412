"""Where in a picture, video or sound each placeholder token lies: one function per family, a row each in `LAYOUTS`.

All that is read is what the model is called with, and its configuration. The processors that belong to these families are
taken for granted: what CLIP's is told to do otherwise (no centre crop, padding to a square) leaves no trace in its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Literal, TypeAlias

from hf_steer.errors import SaliencyError
from hf_steer.ground import pictures
from hf_steer.ground.arguments import Given
from hf_steer.ground.parts import Anatomy
from hf_steer.ground.sounds import sounds_came
from hf_steer.ground.tilings import least_enlarged, least_padded, nearest_ratio, patches_a_token, rounded_up, tokens_in_square
from hf_steer.saliency.ears import EARS, heard
from hf_steer.saliency.eyes import EyeRecord
from hf_steer.saliency.llava import Cuts, all_in_parts, pictures_and_parts, whole_pictures
from hf_steer.saliency.runs import count_by_runs
from hf_steer.saliency.sounds import masked_sounds, padded_sounds
from hf_steer.saliency.tiles import Centred, Cornered, Headed, Tiled, Tiling
from hf_steer.values import Layout

Layouts: TypeAlias = dict[str, list[Layout]]
"""Modality -> the layouts of all its pictures, videos or sound windows in the batch, row by row, as processors list them."""

QWEN_SLACK_TOKENS = 2
"""Sides are rounded to whole tokens by less than one, and twice where qwen-vl-utils has resized the picture before."""


def read_layouts(given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, *, whole: bool) -> Layouts:
    """The layouts of what comes with a call of the model or of `generate`.

    Args:
        given: its arguments.
        records: modality -> what the patched tower recorded, for encoder outputs that the caller passed in.
        anatomy: of the model.
        whole: the arguments are those of `generate`, which alone heeds another aspect ratio than the model's own.

    Raises:
        SaliencyError: the arguments or the model's tower do not tell.
    """
    if anatomy.layout is None:
        return {}
    layouts: Layouts = {}
    for layout in anatomy.layout if isinstance(anatomy.layout, tuple) else (anatomy.layout,):
        read = LAYOUTS.get(layout) if isinstance(layout, str) else layout
        if read is None:
            raise SaliencyError(f"the row of family {anatomy.family!r} has layout {layout!r}; there are {', '.join(LAYOUTS)}.")
        layouts.update(read(given, records, anatomy, whole))
    return layouts


def _grids(given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool) -> Layouts:
    """The whole picture on the whole grid; the grid comes with the pixels (Qwen-VL)."""
    grids: dict[str, Sequence[tuple[int, int, int]]] = {modality: record.grids for modality, record in records.items()}
    merge = anatomy.merge_size
    side = merge * anatomy.patch_px
    for modality, patches in pictures.grids_in(given).items():
        grids[modality] = [(t, height // merge, width // merge) for t, height, width in patches]
    return {
        modality: [Layout(grid=grid, size=(grid[2] * side, grid[1] * side), slack=QWEN_SLACK_TOKENS * side) for grid in own]
        for modality, own in grids.items()
    }


def _grids_of_one_token(given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool) -> Layouts:
    """The same, where the frames of a video are pictures to the prompt (GLM-4V): each is one here."""
    found = _grids(given, records, anatomy, whole)
    if len(found) == 2:
        raise SaliencyError(
            f"pictures and videos stand for one token in the prompts of {anatomy.family!r}, and which is which is not known where "
            "both come. Give them in calls of their own, or one score per token with Saliency.from_tokens(...)."
        )
    frames = [replace(own, grid=(1, *own.grid[1:])) for own in found.get("video", ()) if own.grid for _ in range(own.grid[0])]
    return {"image": [*found.get("image", ()), *frames]}


def _padded_grids(given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool) -> Layouts:
    """The picture in the corner of a grid that comes with the pixels (Kimi-K2.5)."""
    merge, patch = anatomy.merge_size, anatomy.patch_px
    grids = pictures.grids_in(given).get("image", [])
    return {"image": [Cornered((h // merge, w // merge), merge * patch, patch).layout() for _, h, w in grids]} if grids else {}


def _llava(given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool) -> Layouts:
    """As many patches as fit for Pixtral; a square for the other towers."""
    if pictures.count_pictures(given, "image") and pictures.kind_of(pictures.vision_of(anatomy)) == "pixtral":
        patch = pictures.merged_px(anatomy)
        return {"image": [_pixtral_layout(height, width, patch) for height, width in pictures.seen_sizes(given)]}
    return _of_cuts(whole_pictures(given, anatomy, whole))


def _pixtral_layout(height: int, width: int, patch: int) -> Layout:
    """Sides are rounded down to whole pixels and up to whole patches."""
    return Layout(grid=(1, height // patch, width // patch), size=(width, height), slack=patch + 1)


def _pooled_grids(given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool) -> Layouts:
    """As many patches as fit, so many a side to a token; where each lies comes with the pixels (Gemma 4)."""
    if not pictures.pictures_came(given):
        return {}
    joined = patches_a_token(anatomy)
    side = joined * anatomy.patch_px
    layouts = []
    for places in pictures.places_in(given):
        columns, rows = (int(most) // joined + 1 for most in places.amax(0))
        size = (columns * side, rows * side) if min(rows, columns) > 1 else None  # a picture like a thread is squashed
        layouts.append(Layout(grid=(1, rows, columns), size=size, slack=side))
    return {"image": layouts}


def _squares(
    given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool, *, padded: bool = False
) -> Layouts:
    """Each picture squashed, or padded, to a square; the prompt tells how many there are, next to each other or not."""
    if given.ids is None or not pictures.pictures_came(given):
        return {}
    square = tokens_in_square(anatomy)
    per_row = (given.ids == anatomy.placeholder_ids["image"]).sum(1) // square.patches**2
    cut = Centred(square) if padded else Tiled(square, 0, nearest_ratio)
    return {"image": [cut.layout()] * int(per_row.sum())}


def _tiles(
    given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool, *, tiling: Tiling,
    marked: Literal["first", "last"],
) -> Layouts:  # fmt: skip
    """Tiles of each picture, and then the whole; the prompt tells how many there are."""
    if given.ids is None or not pictures.pictures_came(given):
        return {}
    square = tokens_in_square(anatomy)
    tiles = [
        max(0, count // square.patches**2 - 1)
        for count in count_by_runs(given.ids, anatomy.placeholder_ids["image"], marked)
    ]
    return {"image": [Tiled(square, own, tiling).layout() for own in tiles]}


def _headed_tiles(given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool) -> Layouts:
    """Tiles of every picture that a row may have, as an encoder hands them on to a decoder that cross-attends (Mllama)."""
    square, most = pictures.square_of(anatomy), pictures.most_tiles(anatomy)
    rows = pictures.tilings_in(given, anatomy)
    return {"image": [Headed(square, tiled, most).layout() for row in rows for tiled in row]}


def _of_cuts(cuts: Cuts) -> Layouts:
    return {modality: [cut.layout() for cut in own] for modality, own in cuts.items()}


def _heard(name: str, given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool) -> Layouts:
    return heard(given, EARS[name](anatomy)) if sounds_came(given) else {}


LAYOUTS: Mapping[str, Callable[[Given, Mapping[str, EyeRecord], Anatomy, bool], Layouts]] = MappingProxyType(
    {
        # pictures on a grid of their own
        "qwen": _grids,
        "glm4v": _grids_of_one_token,
        "gemma4": _pooled_grids,
        "kimi_k25": _padded_grids,
        # pictures on a square
        "square": _squares,
        "padded_square": partial(_squares, padded=True),
        "llava": _llava,
        # pictures in parts
        "llava_next": lambda given, records, anatomy, whole: _of_cuts(all_in_parts(given, anatomy)),
        "llava_onevision": lambda given, records, anatomy, whole: _of_cuts(pictures_and_parts(given, anatomy, whole)),
        "internvl": partial(_tiles, tiling=nearest_ratio, marked="first"),
        "aya_vision": partial(_tiles, tiling=nearest_ratio, marked="last"),
        "cohere2_vision": partial(_tiles, tiling=least_enlarged, marked="first"),
        "llama4": partial(_tiles, tiling=least_padded, marked="last"),
        "idefics3": partial(_tiles, tiling=rounded_up, marked="last"),
        # pictures in an encoder that the decoder cross-attends to
        "mllama": _headed_tiles,
        # sounds
        "qwen2_audio": lambda given, records, anatomy, whole: masked_sounds(given, anatomy, long=False),
        "audioflamingo3": lambda given, records, anatomy, whole: masked_sounds(given, anatomy, long=True),
        "voxtral": lambda given, records, anatomy, whole: padded_sounds(given, anatomy),
        **{name: partial(_heard, name) for name in EARS},
    }
)
