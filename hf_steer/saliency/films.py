"""Maps of a video's frames, laid onto the frames of a model that was shown others of the same video: by time, not by number.

A frame stands for the time around it, to the middle between it and its neighbours; a step of the model that is steered gets the
mean of the maps over the time that it and they share.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.saliency.paint import Picture


@dataclass(frozen=True)
class FrameTimes:
    """From when to when each frame of a video stands for it.

    Attributes:
        edges: one more than frames, rising; frame i goes from `edges[i]` to `edges[i + 1]`.
        seconds: whether that is known in seconds; otherwise only shares of the whole can be compared.
    """

    edges: tuple[float, ...]
    seconds: bool = False

    @property
    def frames(self) -> int:
        """How many there are."""
        return len(self.edges) - 1

    def joined(self, frames: int) -> FrameTimes:
        """So many frames as one each; the last may be of fewer, which processors repeat until they are enough."""
        return FrameTimes((*self.edges[:-1:frames], self.edges[-1]), self.seconds)

    def shared(self, other: FrameTimes) -> Tensor:
        """`(frames, other's frames)` time that both stand for: in seconds where both know them, else in shares of the whole."""
        own, others = (torch.tensor(times.edges, dtype=torch.float64) for times in (self, other))
        if not (self.seconds and other.seconds):
            own, others = ((edges - edges[0]) / (edges[-1] - edges[0]) for edges in (own, others))
        start, end = torch.maximum(own[:-1, None], others[:-1]), torch.minimum(own[1:, None], others[1:])
        return (end - start).clamp(min=0)


def even_times(frames: int) -> FrameTimes:
    """Frames that share a video evenly."""
    return FrameTimes(tuple(number / frames for number in range(frames + 1)))


def times_of(metadata: Any) -> FrameTimes:
    """What a processor says of a video that it sampled.

    Args:
        metadata: a mapping with `frames_indices` (of the sampled frames), `total_num_frames`, and `fps` of the video, or None.

    Raises:
        SaliencyError: it does not say which frames were sampled, or of how many.
    """
    said = metadata if isinstance(metadata, Mapping) else {}
    indices, total, fps = (said.get(name) for name in ("frames_indices", "total_num_frames", "fps"))
    stamps = [] if indices is None else [float(index) for index in indices]
    if not stamps or not total or stamps != sorted(stamps):
        raise SaliencyError(
            f"of a video, frames_indices (rising) and total_num_frames must be known to say when its frames were; got {metadata!r}."
            " A processor returns them as video_metadata with return_metadata=True."
        )
    # a reader that was told where to begin counts frames from the video's beginning, and their total from there
    first = stamps[0] if stamps[-1] >= total else 0.0
    middles = [(one + other) / 2 for one, other in itertools.pairwise(stamps)]
    edges = [first, *middles, max(first + float(total), stamps[-1])]
    return FrameTimes(tuple(edge / float(fps or 1) for edge in edges), seconds=bool(fps))


@dataclass(frozen=True, eq=False)
class Film:
    """What another model saw in a video.

    Attributes:
        values: `(frames, height, width)` maps, at least 0.
        times: of these maps.
        shown: of the frames that the steered model was shown; None where nobody says, and both are taken to share it evenly.
    """

    values: Tensor
    times: FrameTimes
    shown: FrameTimes | None = None

    def on_steps(self, steps: int, temporal_patch_size: int) -> list[Picture]:
        """One map per step of the steered model, of so many frames each; of zeros where the other model was shown nothing.

        Raises:
            SaliencyError: the model was shown another number of frames than was said.
        """
        own, shown = even_times(len(self.values)), even_times(steps)
        if self.shown is not None:
            own, shown = self.times, self.shown.joined(temporal_patch_size)
        if shown.frames != steps:
            raise SaliencyError(
                f"video_metadata speaks of {self.shown.frames if self.shown else steps} frames, {temporal_patch_size} to a "
                f"step, but the model's inputs have {steps} steps. Give what its own processor returned with return_metadata=True."
            )
        weights = shown.shared(own)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
        maps = (weights @ self.values.double().flatten(1)).view(steps, *self.values.shape[1:])
        return [Picture(step) for step in maps.to(torch.float32)]
