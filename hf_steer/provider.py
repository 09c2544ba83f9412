"""A second model's eyes: a Qwen2-VL looks at the original picture, and its map steers any other decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_steer.config import SaliencyConfig
from hf_steer.errors import PatchError, SaliencyError
from hf_steer.families import family_of
from hf_steer.patching import anatomy_of, read_saliency


@dataclass(frozen=True)
class SaliencyProvider:
    """Looks at pictures and videos for another model; hand it to `Saliency.external`.

    Args:
        model: of the Qwen-VL families, on any device. It is as it was after each look.
        processor: of that model.
        saliency: which source, and which blocks; its own eyes when None. Scores are normalised by the model that is steered.
    """

    model: Any
    processor: Any
    saliency: SaliencyConfig | None = None

    def __post_init__(self) -> None:
        kind = self.model.config.model_type
        if family_of(kind).layout != "qwen":
            raise PatchError(
                f"a saliency provider must be a Qwen-VL model, whose tokens are a regular grid over the picture; got {kind!r}. "
                "Load one, such as Qwen/Qwen2-VL-2B-Instruct, beside the model that is steered."
            )

    def look(self, conversations: Sequence[Any]) -> Mapping[tuple[str, int, int], tuple[Tensor, tuple[int, int], int]]:
        """What it sees in each picture and video.

        Args:
            conversations: one list of messages per row, as `qwen_vl_utils.process_vision_info` takes them.

        Returns:
            `(modality, row, index)` -> map `(frames, height, width)`, at least 0; `(width, height)` of the original in pixels;
            and how many sampled video frames each frame of the map stands for.

        Raises:
            SaliencyError: no picture or video in the conversations.
        """
        from qwen_vl_utils import process_vision_info

        images, videos = process_vision_info(list(conversations))
        if not images and not videos:
            raise SaliencyError("there is no picture and no video in these messages, so a saliency provider sees nothing.")
        texts = [
            self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in conversations
        ]
        inputs = self.processor(text=texts, images=images, videos=videos, return_tensors="pt", padding=True)
        reading = read_saliency(self.model, inputs.to(self.model.device), saliency=self.saliency)
        sizes = {"image": [image.size for image in images or ()], "video": [_video_size(video) for video in videos or ()]}
        temporal = anatomy_of(self.model).temporal_patch_size
        found = {}
        for place, seen in reading.maps().items():
            size = sizes[place[0]].pop(0)  # both go through the rows in their order
            found[place] = (seen - min(0.0, float(seen.min())), size, temporal)  # a map is at least 0; its scale is free
        return found


def _video_size(video: Any) -> tuple[int, int]:
    """`(frames, channels, height, width)`, as `process_vision_info` gives it."""
    return int(video.shape[-1]), int(video.shape[-2])
