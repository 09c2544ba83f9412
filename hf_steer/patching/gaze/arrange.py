"""What a LLaVA's vision tower attended to, laid out as its prompt tokens are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.ground import pictures
from hf_steer.ground.arguments import Given
from hf_steer.ground.parts import Anatomy
from hf_steer.saliency import CUTS, Cut, EyeRecord


@dataclass(frozen=True)
class Arrangement:
    """The pictures, or the videos, of one prompt.

    Attributes:
        modality: `"image"` or `"video"`.
        cuts: how each is cut up for the tower, and laid out again.
        class_tokens: that the tower puts before its patches.
        first: the first of a tower's tokens that the model keeps: 1 where it drops the class token.
    """

    modality: str
    cuts: Sequence[Cut]
    class_tokens: int
    first: int

    @property
    def takes(self) -> tuple[int, ...]:
        """Per picture or video, how many of the tower's pictures it takes: base and parts, or frames."""
        return tuple(cut.takes for cut in self.cuts)

    def counts(self) -> list[int]:
        """Prompt tokens of each picture or video."""
        return [cut.layout().tokens for cut in self.cuts]

    def arrange(self, record: EyeRecord) -> EyeRecord:
        """Scores of prompt tokens from those of the tower's. One group per picture, its parts included, or per video frame;
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
        speaks[:, : self.class_tokens] = 0
        repeated = dataclasses.replace(self, cuts=[cut for cut in self.cuts for _ in range(copies)])
        laid = repeated._lay(torch.stack([scores, speaks], dim=-1))
        groups, first = [], 0
        for picture, takes in zip(laid, repeated.takes, strict=True):
            spoken = picture[:, 1] > 0.5  # newlines are laid out as zeros, and interpolation mixes ones with ones
            frames = takes if self.modality == "video" else 1
            group = torch.full_like(spoken, -1, dtype=torch.long)
            numbers = torch.arange(first, first + frames, device=group.device)
            group[spoken] = numbers.repeat_interleave(int(spoken.sum()) // frames)
            groups.append(group)
            first += frames
        return EyeRecord(torch.cat([picture[:, 0] for picture in laid]), torch.cat(groups))

    def _lay(self, features: Tensor) -> list[Tensor]:
        """`(pictures of the tower, its tokens, channels)` -> `(prompt tokens, channels)` per picture or video."""
        parts = features[:, self.first :].split(self.takes)
        return [cut.lay(part) for cut, part in zip(self.cuts, parts, strict=True)]


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
    first = pictures.first_token(given, anatomy)
    cuts = CUTS[anatomy.arrangement](given, anatomy, whole)
    return {
        modality: Arrangement(modality, own, anatomy.class_tokens, first)
        for modality, own in cuts.items()
        if modality in anatomy.placeholder_ids
    }
