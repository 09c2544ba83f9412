"""How a LLaVA lays out what its vision tower saw as prompt tokens: by the model's own methods, on scores for features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.errors import SaliencyError
from hf_steer.saliency import EyeRecord
from hf_steer.values import Anatomy


@dataclass(frozen=True)
class Arrangement:
    """The pictures, or the videos, of one prompt.

    Attributes:
        anatomy: of the model.
        modality: `"image"` or `"video"`.
        takes: per picture or video, how many of the tower's pictures it takes: base and crops, or frames.
        sizes: of the original pictures, `(height, width)` in pixels; empty where the model does not ask.
        first: the first of a tower's tokens that the model keeps: 1 where it drops the class token.
        aspect_ratio: of an anyres model, such as `"anyres_max_9"`.
    """

    anatomy: Anatomy
    modality: str
    takes: tuple[int, ...]
    sizes: tuple[Any, ...]
    first: int
    aspect_ratio: str | None

    def counts(self) -> list[int]:
        """Prompt tokens of each picture or video."""
        vision = self.anatomy.root.config.vision_config
        seen = self.anatomy.class_tokens + (vision.image_size // vision.patch_size) ** 2
        return [len(tokens) for tokens in self._lay(torch.zeros(sum(self.takes), seen, 1))]

    def arrange(self, record: EyeRecord) -> EyeRecord:
        """Scores of prompt tokens from those of the tower's. One group per picture, its crops included, or per video frame;
        newlines and class tokens say nothing.

        Raises:
            SaliencyError: the tower saw another number of pictures.
        """
        seen = int(record.group.max()) + 1
        copies, rest = divmod(seen, sum(self.takes))  # up to transformers 5.17 pictures were repeated for beams
        if rest or not copies:
            raise SaliencyError(
                f"{self.modality} count does not match: the prompt asks the vision tower for {sum(self.takes)} pictures, crops "
                f"and frames included, and it saw {seen}. Build the prompt and the pixels with one call of the model's processor."
            )
        scores = record.scores.view(seen, -1)
        speaks = torch.ones_like(scores)
        speaks[:, : self.anatomy.class_tokens] = 0
        pictures = self._repeated(copies)._lay(torch.stack([scores, speaks], dim=-1))
        groups, first = [], 0
        for picture, takes in zip(pictures, self._repeated(copies).takes, strict=True):
            spoken = picture[:, 1] > 0.5  # newlines are laid out as zeros, and interpolation mixes ones with ones
            frames = takes if self.modality == "video" else 1
            group = torch.full_like(spoken, -1, dtype=torch.long)
            numbers = torch.arange(first, first + frames, device=group.device)
            group[spoken] = numbers.repeat_interleave(int(spoken.sum()) // frames)
            groups.append(group)
            first += frames
        return EyeRecord(torch.cat([picture[:, 0] for picture in pictures]), torch.cat(groups))

    def _repeated(self, copies: int) -> Arrangement:
        """Each picture several times in a row."""
        takes, sizes = (tuple(item for item in items for _ in range(copies)) for items in (self.takes, self.sizes))
        return dataclasses.replace(self, takes=takes, sizes=sizes)

    def _lay(self, features: Tensor) -> list[Tensor]:
        """`(pictures of the tower, its tokens, channels)` -> `(prompt tokens, channels)` per picture or video."""
        arrangement = str(self.anatomy.arrangement), self.modality
        return LAYOUTS[arrangement](self, features[:, self.first :])


def _whole(arrangement: Arrangement, features: Tensor) -> list[Tensor]:
    return list(features)


def _anyres(arrangement: Arrangement, features: Tensor) -> list[Tensor]:
    model: Any = arrangement.anatomy.base
    packed, _ = model.pack_image_features(
        features.split(arrangement.takes),
        arrangement.sizes,
        image_newline=features.new_zeros(features.shape[-1]),
        vision_aspect_ratio=arrangement.aspect_ratio,
    )
    return list(packed)


def _pooled(arrangement: Arrangement, features: Tensor) -> list[Tensor]:
    model: Any = arrangement.anatomy.base
    videos = model.apply_pooling(features).split(arrangement.takes)
    return [F.pad(video.flatten(0, 1), (0, 0, 0, 1)) for video in videos]  # a newline ends each video


LAYOUTS: Mapping[tuple[str, str], Callable[[Arrangement, Tensor], list[Tensor]]] = MappingProxyType(
    {("whole", "image"): _whole, ("anyres", "image"): _anyres, ("anyres", "video"): _pooled}
)


def read_arrangements(
    named: Mapping[str, Any], anatomy: Anatomy, pixels: Mapping[str, str], *, whole: bool
) -> dict[str, Arrangement]:
    """Modality -> how the pictures in the arguments of a forward pass or of `generate` are laid out.

    Args:
        named: arguments by name.
        anatomy: of the model; nothing is found where its tower's tokens are the prompt's.
        pixels: modality -> name of the argument that holds its pixels.
        whole: the arguments are those of `generate`, which alone heeds `vision_aspect_ratio`.

    Raises:
        SaliencyError: an anyres model's pictures came without `image_sizes`, or with another number of them.
    """
    if anatomy.arrangement is None:
        return {}
    config, outputs = anatomy.root.config, named.get("mm_encoder_outputs") or {}
    strategy = named.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    arrangements = {}
    for modality in anatomy.placeholder_ids:
        given: Tensor | None = named.get(pixels[modality])
        output: Any = outputs.get(modality)
        if given is None and output is None:
            continue
        sizes: tuple[Any, ...] = ()
        ratio = None
        if modality == "video":
            takes = _frames(config, given, output)
        elif anatomy.arrangement == "whole":
            takes = (1,) * len(output.pooler_output if given is None else given)
        else:
            sizes = _sizes(named)
            takes = _crops(config, sizes, named.get("batch_num_images"))
            ratio = (named.get("vision_aspect_ratio") if whole else None) or config.vision_aspect_ratio
        arrangements[modality] = Arrangement(anatomy, modality, takes, sizes, int(strategy == "default"), ratio)
    return arrangements


def _frames(config: Any, pixels: Tensor | None, output: Any) -> tuple[int, ...]:
    """Frames of each video, from its pixels `(videos, frames, ...)`, or its features `(videos, tokens, features)`."""
    if pixels is not None:
        return (pixels.shape[1],) * pixels.shape[0]
    side = -(-(config.vision_config.image_size // config.vision_config.patch_size) // 2)
    return tuple((len(video) - 1) // side**2 for video in output.pooler_output)


def _sizes(named: Mapping[str, Any]) -> tuple[Any, ...]:
    sizes = named.get("image_sizes")
    if sizes is None:
        raise SaliencyError(
            "image_sizes is missing, without which the place of an anyres model's image tokens is unknown. Pass it on as the "
            "processor gives it, also beside mm_encoder_outputs."
        )
    return tuple(sizes.tolist() if isinstance(sizes, Tensor) else sizes)


def _crops(config: Any, sizes: tuple[Any, ...], per_row: Any) -> tuple[int, ...]:
    """Base and crops of each picture; the base alone where a row has several pictures."""
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    numbers = [1] * len(sizes) if per_row is None else [int(number) for number in per_row]
    alone = [number == 1 for number in numbers for _ in range(number)]
    if len(alone) != len(sizes):
        raise SaliencyError(
            f"batch_num_images counts {len(alone)} pictures, image_sizes has {len(sizes)}. Pass both as the processor gives them."
        )
    return tuple(
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if one else 1
        for size, one in zip(sizes, alone, strict=True)
    )
