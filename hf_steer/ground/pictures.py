"""What transformers says of pictures and videos: which came, how large they are, and what a LLaVA's processor makes of a size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from hf_steer.errors import SaliencyError
from hf_steer.ground.arguments import Given, name_of
from hf_steer.ground.outputs import pooled_in
from hf_steer.ground.parts import Anatomy
from hf_steer.ground.settings import has_setting, setting, side_of

CLASS_TOKENS: Mapping[str, int] = MappingProxyType({"clip_vision_model": 1, "siglip_vision_model": 0})
"""Towers on a fixed square, whose attention can be read, and how many tokens they put before the patches."""


@dataclass(frozen=True)
class Square:
    """What a tower with a fixed square sees.

    Attributes:
        side_px: of the square.
        patch_px: of a patch; what remains beside the last whole patch is not seen.
    """

    side_px: int
    patch_px: int

    @property
    def patches(self) -> int:
        """Patches a side."""
        return self.side_px // self.patch_px

    @property
    def pooled(self) -> int:
        """Tokens a side of a video's frame: half as many as patches, rounded up."""
        return -(-self.patches // 2)


def vision_of(anatomy: Anatomy) -> Any:
    """The configuration of a model's eye."""
    return setting(anatomy.root.config, "vision")


def kind_of(config: Any) -> str:
    """Which architecture a configuration is of."""
    return str(config.model_type)


def square_of(anatomy: Anatomy) -> Square:
    """The square of a model's eye."""
    vision = vision_of(anatomy)
    return Square(side_of(vision, "side_px"), side_of(vision, "patch_px"))


def merged_px(anatomy: Anatomy) -> int:
    """The side of a prompt token in pixels, where a tower of any size joins so many patches a side to one: Qwen-VL, Mistral 3."""
    vision, config = vision_of(anatomy), anatomy.root.config
    owner = vision if has_setting(vision, "merge") else config
    return side_of(vision, "patch_px") * (side_of(owner, "merge") if has_setting(owner, "merge") else 1)


def most_tiles(anatomy: Anatomy) -> int:
    """How many tiles an eye hands on of every picture, those of padding included."""
    return int(setting(vision_of(anatomy), "most_tiles"))


def resolutions_of(anatomy: Anatomy) -> Any:
    """Heights and widths that an anyres model's parts may tile, in pixels."""
    return setting(anatomy.root.config, "resolutions_px")


def grids_in(given: Given) -> dict[str, list[tuple[int, int, int]]]:
    """Modality -> frames, height and width of each picture in patches, where the processor says so."""
    grids = {"image": given.image_grids, "video": given.video_grids}
    return {modality: [(t, h, w) for t, h, w in grid.tolist()] for modality, grid in grids.items() if grid is not None}


def places_in(given: Given) -> list[Tensor]:
    """Of each picture `(patches, 2)` column and row of its patches, as the processor says, without padding.

    Raises:
        SaliencyError: they did not come along.
    """
    places: Tensor | None = given.patch_places
    if places is None:
        raise _missing("patch_places", given)
    return [own[(own >= 0).all(1)] for own in places]


def tilings_in(given: Given, anatomy: Anatomy) -> list[list[tuple[int, int] | None]]:
    """Of each row's pictures, rows and columns of the tiles that the processor cut it into; None for one that is not there.

    Raises:
        SaliencyError: they did not come along.
    """
    if given.tilings is None:
        raise _missing("tilings", given)
    known = [tuple(own) for own in setting(vision_of(anatomy), "tilings")]
    return [[known[number - 1] if number else None for number in row] for row in torch.as_tensor(given.tilings).tolist()]


def features_of(given: Given, modality: str) -> Any:
    """Features that the caller computed: one tensor per picture, or one for all videos; None without."""
    output = given.features(modality)
    return None if output is None else pooled_in(output)


def pictures_came(given: Given) -> bool:
    """Whether pixels or features of pictures came, however many they are."""
    return given.image_pixels is not None or given.features("image") is not None


def count_pictures(given: Given, modality: str) -> int:
    """How many pictures, or videos, came as pixels or as features."""
    pixels = given.pixels(modality)
    found: Any = features_of(given, modality) if pixels is None else pixels
    return 0 if found is None else len(found)


def sizes_in(given: Given) -> list[tuple[int, int]]:
    """Height and width of each original picture, in pixels.

    Raises:
        SaliencyError: they did not come along.
    """
    if given.image_sizes is None:
        raise _missing("image_sizes", given)
    return [(int(height), int(width)) for height, width in torch.as_tensor(given.image_sizes).tolist()]


def _missing(word: str, given: Given) -> SaliencyError:
    """Something that the processor returned was not handed on."""
    name, came = name_of(word), name_of("encoded" if given.image_pixels is None else "image_pixels")
    return SaliencyError(
        f"{name} did not come with {came}, so where in a picture each token lies is unknown. Pass {name} as well, "
        "as the processor returned it, or give one score per token with Saliency.from_tokens(...)."
    )


def seen_sizes(given: Given) -> list[tuple[int, int]]:
    """Height and width of each picture as a tower of any size sees it, in pixels: as told, or those of the pixels."""
    pixels = given.image_pixels
    if given.image_sizes is None and pixels is not None:
        return [(pixels.shape[-2], pixels.shape[-1])] * len(pixels)
    return sizes_in(given)


def alone_in_prompt(given: Given, pictures: int) -> list[bool]:
    """Of each picture, whether its prompt has no other.

    Raises:
        SaliencyError: another number of pictures is counted than came.
    """
    per_row = given.images_per_row
    numbers = [1] * pictures if per_row is None else [int(number) for number in per_row]
    alone = [number == 1 for number in numbers for _ in range(number)]
    if len(alone) != pictures:
        raise SaliencyError(
            f"{name_of('images_per_row')} counts {len(alone)} pictures, {name_of('image_sizes')} has {pictures}. Pass both as the "
            "processor gives them."
        )
    return alone


def frames_in(given: Given, anatomy: Anatomy) -> tuple[int, ...]:
    """Frames of each video, from its pixels `(videos, frames, ...)`, or its features `(videos, tokens, features)`."""
    pixels: Tensor | None = given.video_pixels
    if pixels is not None:
        return (pixels.shape[1],) * pixels.shape[0]
    pooled = square_of(anatomy).pooled
    return tuple((len(video) - 1) // pooled**2 for video in features_of(given, "video"))


def first_token(given: Given, anatomy: Anatomy) -> int:
    """The first of a tower's tokens that a LLaVA keeps: its strategy "default" drops one, and so do those without (VipLLaVA)."""
    config = anatomy.root.config
    configured = setting(config, "feature_strategy") if has_setting(config, "feature_strategy") else "default"
    return int((given.feature_strategy or configured) == "default")


def aspect_ratio(given: Given, anatomy: Anatomy, *, whole: bool) -> str:
    """Of an anyres model, such as `"anyres_max_9"`. A forward pass drops the argument; only `generate` hands it on (`whole`)."""
    asked = given.aspect_ratio if whole else None
    return str(asked or setting(anatomy.root.config, "aspect_ratio"))


def fit_canvas(size: tuple[int, int], resolutions: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a picture `(height, width)`, the canvas that fits best, and the size that it has on it."""
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.image_utils import ChannelDimension

    best = select_best_resolution(size, resolutions)
    return best, get_patch_output_size(torch.empty(3, *size, device="meta"), best, ChannelDimension.FIRST)


def without_padding(canvas: Tensor, size: tuple[int, int]) -> Tensor:
    """`(channels, height, width)` of the patches of a canvas without those of padding alone, as the model takes them out."""
    # imported here, since it loads the model's file, which is loaded whenever this runs
    from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

    return unpad_image(canvas, list(size))  # type: ignore[no-any-return]


def window_of(tower: Any) -> tuple[int, int]:
    """Side of a window, and of a patch, in pixels, of a tower that permutes windows."""
    return tower.window_size, tower.patch_size


def window_order(grids: Tensor, merge_size: int, window_px: int, patch_px: int) -> Tensor:
    """In which order a tower that permutes windows sees its merge blocks; `grids` are `(pictures, 3)` in patches."""
    order, _ = get_vision_window_index(grids.cpu(), merge_size, window_px, patch_px)
    return order
