"""How a LLaVA lays out what its vision tower saw as prompt tokens: by the model's own methods, on scores for features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.errors import SaliencyError
from hf_steer.ground import pictures
from hf_steer.ground.arguments import Given
from hf_steer.ground.parts import Anatomy
from hf_steer.saliency import EyeRecord


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
    sizes: tuple[tuple[int, int], ...]
    first: int
    aspect_ratio: str | None

    def counts(self) -> list[int]:
        """Prompt tokens of each picture or video."""
        seen = self.anatomy.class_tokens + pictures.square_of(self.anatomy).patches ** 2
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
        takes = tuple(taken for taken in self.takes for _ in range(copies))
        sizes = tuple(size for size in self.sizes for _ in range(copies))
        return dataclasses.replace(self, takes=takes, sizes=sizes)

    def _lay(self, features: Tensor) -> list[Tensor]:
        """`(pictures of the tower, its tokens, channels)` -> `(prompt tokens, channels)` per picture or video."""
        arrangement = str(self.anatomy.arrangement), self.modality
        return LAYOUTS[arrangement](self, features[:, self.first :])


def _whole(arrangement: Arrangement, features: Tensor) -> list[Tensor]:
    return list(features)


def _anyres(arrangement: Arrangement, features: Tensor) -> list[Tensor]:
    own = arrangement
    return pictures.pack_pictures(own.anatomy, features, own.takes, own.sizes, own.aspect_ratio)


def _pooled(arrangement: Arrangement, features: Tensor) -> list[Tensor]:
    videos = pictures.pool_frames(arrangement.anatomy, features).split(arrangement.takes)
    return [F.pad(video.flatten(0, 1), (0, 0, 0, 1)) for video in videos]  # a newline ends each video


LAYOUTS: Mapping[tuple[str, str], Callable[[Arrangement, Tensor], list[Tensor]]] = MappingProxyType(
    {("whole", "image"): _whole, ("anyres", "image"): _anyres, ("anyres", "video"): _pooled}
)


def read_arrangements(given: Given, anatomy: Anatomy, *, whole: bool) -> dict[str, Arrangement]:
    """Modality -> how the pictures in the arguments of a forward pass or of `generate` are laid out.

    Args:
        given: the arguments.
        anatomy: of the model; nothing is found where its tower's tokens are the prompt's.
        whole: the arguments are those of `generate`, which alone heeds another aspect ratio than the model's own.

    Raises:
        SaliencyError: an anyres model's pictures came without their sizes, or with another number of them.
    """
    if anatomy.arrangement is None:
        return {}
    arrangements = {}
    for modality in anatomy.placeholder_ids:
        count = pictures.count_pictures(given, modality)
        if not count:
            continue
        sizes: tuple[tuple[int, int], ...] = ()
        ratio = None
        if modality == "video":
            takes = pictures.frames_in(given, anatomy)
        elif anatomy.arrangement == "whole":
            takes = (1,) * count
        else:
            sizes = tuple(pictures.sizes_in(given))
            alone = pictures.alone_in_prompt(given, len(sizes))
            takes = tuple(
                pictures.count_crops(size, anatomy) if single else 1 for size, single in zip(sizes, alone, strict=True)
            )
            ratio = pictures.aspect_ratio(given, anatomy, whole=whole)
        first = pictures.first_token(given, anatomy)
        arrangements[modality] = Arrangement(anatomy, modality, takes, sizes, first, ratio)
    return arrangements
