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
from hf_steer.saliency.films import FrameTimes, even_times, times_of
from hf_steer.saliency.picture_files import is_picture, open_upright, refuse_lying, upright

PLACES = ("image", "image_url", "video")
"""Where a message holds a picture, a video, or the frames of one."""
ELSEWHERE = ("http://", "https://", "data:")
"""What qwen-vl-utils fetches for itself."""


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

    def look(self, conversations: Sequence[Any]) -> Mapping[tuple[str, int, int], tuple[Tensor, tuple[int, int], FrameTimes]]:
        """What it sees in each picture and video.

        Args:
            conversations: one list of messages per row, as `qwen_vl_utils.process_vision_info` takes them. Pictures that are
                given by path or address are turned upright.

        Returns:
            `(modality, row, index)` -> map `(frames, height, width)`, at least 0; `(width, height)` of the original in pixels;
            and from when to when each frame of the map stands for a video.

        Raises:
            SaliencyError: no picture or video in the conversations, or a PIL picture that is yet to be turned upright.
        """
        rows = [_upright(turns) for turns in conversations]
        images, videos, times = _fetch(rows)
        if not images and not videos:
            raise SaliencyError("there is no picture and no video in these messages, so a saliency provider sees nothing.")
        texts = [self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in rows]
        # what was sampled once is not sampled again (Qwen3-VL's processor would)
        more = {"video_metadata": [said for _, said in videos], "do_sample_frames": False} if videos else {}
        frames = [pixels for pixels, _ in videos] or None
        inputs = self.processor(text=texts, images=images, videos=frames, return_tensors="pt", padding=True, **more)
        reading = read_saliency(self.model, inputs.to(self.model.device), saliency=self.saliency)
        sizes = {"image": [image.size for image in images or ()], "video": [_video_size(video) for video in frames or ()]}
        when = {"image": [even_times(1) for _ in sizes["image"]], "video": times}
        temporal = {"image": 1, "video": anatomy_of(self.model).temporal_patch_size}
        found = {}
        for place, seen in reading.maps().items():
            size, own = sizes[place[0]].pop(0), when[place[0]].pop(0).joined(temporal[place[0]])  # both go row by row
            if own.frames != len(seen):
                raise SaliencyError(
                    f"the provider's processor made {len(seen)} steps of a video of which {own.frames} were sampled. Give the "
                    "provider the processor of its own model."
                )
            found[place] = (seen - min(0.0, float(seen.min())), size, own)  # a map is at least 0; its scale is free
        return found


def _fetch(rows: Sequence[Any]) -> tuple[list[Any] | None, list[tuple[Tensor, Any]], list[FrameTimes]]:
    """Pictures, or None; videos with what is said of them; and when the frames of each were."""
    from qwen_vl_utils import extract_vision_info, process_vision_info

    images, videos, _ = process_vision_info(rows, return_video_kwargs=True, return_video_metadata=True)
    clips = [element["video"] for element in extract_vision_info(rows) if "video" in element]
    # of frames that came one by one it makes up when they were, and repeats the last of an odd number
    times = [
        times_of(said) if isinstance(clip, str) else even_times(len(clip))
        for clip, (_, said) in zip(clips, videos or (), strict=True)
    ]
    return None if images is None else [upright(image) for image in images], list(videos or ()), times


def _upright(turns: Sequence[Any]) -> list[Any]:
    """The same messages, pictures and frames opened as people see them. What comes by address is turned once it is fetched."""
    return [
        {**turn, "content": [_opened(part) for part in turn["content"]]} if isinstance(turn["content"], list) else turn
        for turn in turns
    ]


def _opened(part: Mapping[str, Any]) -> dict[str, Any]:
    opened = dict(part)
    for name in PLACES:
        given = part.get(name)
        if isinstance(given, (list, tuple)):
            opened[name] = [_picture(frame) for frame in given]
        elif given is not None and name != "video":
            opened[name] = _picture(given)
    return opened


def _picture(given: Any) -> Any:
    if is_picture(given):
        refuse_lying(given)
        return given
    here = isinstance(given, str) and not given.startswith(ELSEWHERE)
    return open_upright(given.removeprefix("file://")) if here else given


def _video_size(video: Any) -> tuple[int, int]:
    """`(frames, channels, height, width)`, as `process_vision_info` gives it."""
    return int(video.shape[-1]), int(video.shape[-2])
