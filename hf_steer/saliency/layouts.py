"""Where in a picture, video or sound each placeholder token lies: one function per family, a row each in `LAYOUTS`.

All that is read is what the model is called with, and its configuration. The processors that belong to these families are
taken for granted: what CLIP's is told to do otherwise (no centre crop, padding to a square) leaves no trace in its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

from hf_steer.errors import SaliencyError
from hf_steer.ground import pictures
from hf_steer.ground.arguments import Given
from hf_steer.ground.parts import Anatomy
from hf_steer.saliency.ears import EARS, heard
from hf_steer.saliency.eyes import EyeRecord
from hf_steer.saliency.llava import Cuts, pictures_and_parts, whole_pictures
from hf_steer.saliency.sounds import masked_sounds, padded_sounds
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


def _qwen(given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool) -> Layouts:
    """The whole picture on the whole grid; the grid comes with the pixels."""
    grids: dict[str, Sequence[tuple[int, int, int]]] = {modality: record.grids for modality, record in records.items()}
    merge = anatomy.merge_size
    side = merge * anatomy.patch_px
    for modality, patches in pictures.grids_in(given).items():
        grids[modality] = [(t, height // merge, width // merge) for t, height, width in patches]
    return {
        modality: [Layout(grid=grid, size=(grid[2] * side, grid[1] * side), slack=QWEN_SLACK_TOKENS * side) for grid in own]
        for modality, own in grids.items()
    }


def _llava(given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool) -> Layouts:
    """As many patches as fit for Pixtral; a square for the other towers."""
    if pictures.count_pictures(given, "image") and pictures.kind_of(pictures.vision_of(anatomy)) == "pixtral":
        patch = anatomy.patch_px
        return {"image": [_pixtral_layout(height, width, patch) for height, width in pictures.seen_sizes(given)]}
    return _of_cuts(whole_pictures(given, anatomy, whole))


def _pixtral_layout(height: int, width: int, patch: int) -> Layout:
    """Sides are rounded down to whole pixels and up to whole patches."""
    return Layout(grid=(1, height // patch, width // patch), size=(width, height), slack=patch + 1)


def _of_cuts(cuts: Cuts) -> Layouts:
    return {modality: [cut.layout() for cut in own] for modality, own in cuts.items()}


def _heard(name: str, given: Given, records: Mapping[str, EyeRecord], anatomy: Anatomy, whole: bool) -> Layouts:
    return heard(given, EARS[name](anatomy))


LAYOUTS: Mapping[str, Callable[[Given, Mapping[str, EyeRecord], Anatomy, bool], Layouts]] = MappingProxyType(
    {
        "qwen": _qwen,
        "llava": _llava,
        "llava_onevision": lambda given, records, anatomy, whole: _of_cuts(pictures_and_parts(given, anatomy, whole)),
        "qwen2_audio": lambda given, records, anatomy, whole: masked_sounds(given, anatomy, long=False),
        "audioflamingo3": lambda given, records, anatomy, whole: masked_sounds(given, anatomy, long=True),
        "voxtral": lambda given, records, anatomy, whole: padded_sounds(given, anatomy),
        **{name: partial(_heard, name) for name in EARS},
    }
)
