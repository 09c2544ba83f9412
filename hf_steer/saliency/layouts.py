"""Where in a picture, video or sound each placeholder token lies: one function per family, a row each in `LAYOUTS`.

All that is read is what the model is called with, and its configuration. The processors that belong to these families are
taken for granted: what CLIP's is told to do otherwise (no centre crop, padding to a square) leaves no trace in its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.saliency.anyres import anyres_layout, padded_layout, patch_cells, pooled_layout, pooled_side
from hf_steer.saliency.eyes import EyeRecord
from hf_steer.saliency.sounds import masked_sounds, padded_sounds
from hf_steer.values import Anatomy, Layout

Layouts: TypeAlias = dict[str, list[Layout]]
"""Modality -> the layouts of all its pictures, videos or sound windows in the batch, row by row, as processors list them."""

GRIDS = MappingProxyType({"image": "image_grid_thw", "video": "video_grid_thw"})
QWEN_SLACK_TOKENS = 2
"""Sides are rounded to whole tokens by less than one, and twice where qwen-vl-utils has resized the picture before."""


def read_layouts(named: Mapping[str, Any], records: Mapping[str, EyeRecord], anatomy: Anatomy) -> Layouts:
    """The layouts of what comes with a call of the model or of `generate`.

    Args:
        named: its arguments by name.
        records: modality -> what the patched tower recorded, for encoder outputs that the caller passed in.
        anatomy: of the model.

    Raises:
        SaliencyError: the arguments or the model's tower do not tell.
    """
    return {} if anatomy.layout is None else LAYOUTS[anatomy.layout](named, records, anatomy)


def _qwen(named: Mapping[str, Any], records: Mapping[str, EyeRecord], anatomy: Anatomy) -> Layouts:
    """The whole picture on the whole grid; the grid comes with the pixels."""
    grids: dict[str, Sequence[tuple[int, int, int]]] = {modality: record.grids for modality, record in records.items()}
    merge = anatomy.merge_size
    for modality, name in GRIDS.items():
        if named.get(name) is not None:
            grids[modality] = [(t, height // merge, width // merge) for t, height, width in named[name].tolist()]
    side = merge * anatomy.root.config.vision_config.patch_size
    return {
        modality: [Layout(grid=grid, size=(grid[2] * side, grid[1] * side), slack=QWEN_SLACK_TOKENS * side) for grid in own]
        for modality, own in grids.items()
    }


CLASS_TOKENS = MappingProxyType({"clip_vision_model": 1, "siglip_vision_model": 0})
"""Towers on a fixed square -> tokens before the patches. CLIP's processor cuts out the centre, SigLIP's squashes the whole."""


def _llava(named: Mapping[str, Any], records: Mapping[str, EyeRecord], anatomy: Anatomy) -> Layouts:
    """A square of patches for CLIP and SigLIP, as many as fit for Pixtral; the strategy "default" drops the first token."""
    config = anatomy.root.config
    tower = config.vision_config
    pictures = _count(named, "pixel_values", "image")
    if not pictures:
        return {}
    if tower.model_type == "pixtral":
        return {"image": [_pixtral_layout(height, width, tower.patch_size) for height, width in _pixtral_sizes(named)]}
    if tower.model_type not in CLASS_TOKENS:
        known = ", ".join(("pixtral", *CLASS_TOKENS))
        raise SaliencyError(
            f"where in a picture each token lies is known of LLaVA models with the towers {known}; this one's is "
            f"{tower.model_type!r}. Give one score per token with Saliency.from_tokens(...)."
        )
    strategy = named.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    side = tower.image_size // tower.patch_size
    nowhere = torch.full((CLASS_TOKENS[tower.model_type], 4), torch.nan, dtype=torch.float64)
    cells = torch.cat([nowhere, patch_cells(tower.image_size, tower.patch_size)])[1 if strategy == "default" else 0 :]
    whole = bool(torch.isfinite(cells).all(1).sum() == side**2)
    crop_px = tower.image_size if tower.model_type == "clip_vision_model" else None
    return {"image": [Layout(grid=(1, side, side) if whole else None, cells=cells, crop_px=crop_px)] * pictures}


def _pixtral_sizes(named: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Height and width of each picture as the tower sees it, in pixels."""
    sizes, pixels = named.get("image_sizes"), named.get("pixel_values")
    if sizes is not None:
        return [(int(height), int(width)) for height, width in torch.as_tensor(sizes).tolist()]
    if pixels is None:
        raise _lacking("image_sizes")
    return [(pixels.shape[-2], pixels.shape[-1])] * len(pixels)


def _pixtral_layout(height: int, width: int, patch: int) -> Layout:
    """Sides are rounded down to whole pixels and up to whole patches."""
    return Layout(grid=(1, height // patch, width // patch), size=(width, height), slack=patch + 1)


def _llava_onevision(named: Mapping[str, Any], records: Mapping[str, EyeRecord], anatomy: Anatomy) -> Layouts:
    """Pictures that are alone in their prompt come whole and in parts, others whole; videos in pooled frames."""
    config = anatomy.root.config
    layouts: Layouts = {}
    if _count(named, "pixel_values", "image"):
        if named.get("image_sizes") is None:
            raise _lacking("image_sizes")
        sizes = [(int(height), int(width)) for height, width in torch.as_tensor(named["image_sizes"]).tolist()]
        together = named.get("batch_num_images")
        counts = [1] * len(sizes) if together is None else [int(count) for count in together]
        alone = [count == 1 for count in counts for _ in range(count)]
        most = named.get("vision_aspect_ratio") or config.vision_aspect_ratio
        layouts["image"] = [
            anyres_layout(height, width, config, most) if single else padded_layout(height, width, config)
            for (height, width), single in zip(sizes, alone, strict=False)
        ]
    videos = _count(named, "pixel_values_videos", "video")
    if videos:
        pixels, features = named.get("pixel_values_videos"), _encoded(named, "video")
        frames = (features.shape[1] - 1) // pooled_side(config) ** 2 if pixels is None else pixels.shape[1]
        layouts["video"] = [pooled_layout(frames, config)] * videos
    return layouts


def _encoded(named: Mapping[str, Any], modality: str) -> Any:
    """Features that the caller computed: one tensor per picture, or one for all videos; None without."""
    output = (named.get("mm_encoder_outputs") or {}).get(modality)
    return None if output is None else output.pooler_output


def _count(named: Mapping[str, Any], pixels: str, modality: str) -> int:
    given: Tensor | Sequence[Tensor] | None = named.get(pixels)
    features = _encoded(named, modality) if given is None else given
    return 0 if features is None else len(features)


def _lacking(name: str) -> SaliencyError:
    return SaliencyError(
        f"{name} did not come with mm_encoder_outputs, so where in a picture each token lies is unknown. Pass {name} as well, "
        "as the processor returned it, or give one score per token with Saliency.from_tokens(...)."
    )


LAYOUTS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, EyeRecord], Anatomy], Layouts]] = MappingProxyType(
    {
        "qwen": _qwen,
        "llava": _llava,
        "llava_onevision": _llava_onevision,
        "qwen2_audio": lambda named, records, anatomy: masked_sounds(named, anatomy, long=False),
        "audioflamingo3": lambda named, records, anatomy: masked_sounds(named, anatomy, long=True),
        "voxtral": lambda named, records, anatomy: padded_sounds(named, anatomy),
    }
)
