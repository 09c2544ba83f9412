"""Seconds of the tokens of sounds. Whisper's feature extractor, which all these families use, makes a mel frame every 10 ms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_steer.ground import sounds
from hf_steer.ground.arguments import Given
from hf_steer.ground.parts import Anatomy
from hf_steer.values import Layout

FRAME_SECONDS = 0.01
FRAMES_PER_TOKEN = 4
"""Of Qwen2-Audio and Audio Flamingo 3: a convolution of stride 2, then the mean of two."""


def masked_sounds(given: Given, anatomy: Anatomy, *, long: bool) -> dict[str, list[Layout]]:
    """One layout per row of mel frames, as long as its mask says.

    Args:
        given: arguments of the call.
        anatomy: of the model.
        long: whether a full window goes on in the next (Audio Flamingo 3) or the processor cuts the sound there (Qwen2-Audio).
    """
    mask = given.mel_mask
    if mask is None:
        return {}
    lengths = mask.sum(-1)
    counts = sounds.count_tokens(anatomy, lengths)
    layouts = []
    for frames, tokens in zip(lengths.tolist(), counts, strict=True):
        full = frames == mask.shape[-1]
        slack = math.inf if full else FRAME_SECONDS  # a full window may have been cut: its sound may be longer
        size = (frames * FRAME_SECONDS,)
        layouts.append(Layout(cells=_intervals(tokens, FRAMES_PER_TOKEN), size=size, slack=slack, continues=long and full))
    return {"audio": layouts}


def padded_sounds(given: Given, anatomy: Anatomy) -> dict[str, list[Layout]]:
    """One layout per row of mel frames, all full windows: Voxtral pads a sound with silence, and does not say where."""
    if given.mels is None:
        return {}
    frames, tokens = sounds.window_of(anatomy)
    seconds = frames * FRAME_SECONDS
    layout = Layout(cells=_intervals(tokens, frames / tokens), size=(seconds,), slack=seconds, continues=True)
    return {"audio": [layout] * len(given.mels)}


def frames_of(places: int, step_seconds: float, start_seconds: float = 0.0, whole_seconds: float = 0.0) -> Layout:
    """What an encoder hands on of a sound, or of a stretch of a longer one; padding stands for silence.

    Args:
        places: how many positions it hands on.
        step_seconds: what each of them stands for.
        start_seconds: where the first begins.
        whole_seconds: how long the sound is, as far as it is longer.
    """
    middles = torch.arange(places + 1, dtype=torch.float64) - 0.5  # a convolution with padding puts the first on the beginning
    edges = start_seconds + middles * step_seconds
    size = max(start_seconds + places * step_seconds, whole_seconds)
    return Layout(cells=torch.stack([edges[:-1], edges[1:]], 1), size=(size,), slack=math.inf, continues=True)


def join_windows(first: Layout, second: Layout) -> Layout:
    """One sound out of a full window and what goes on with it."""
    (before,), (more,) = first.size or (), second.size or ()
    cells = torch.cat([first.cells, second.cells + before])  # type: ignore[list-item, operator]
    return Layout(cells=cells, size=(before + more,), slack=second.slack, continues=second.continues)


def _intervals(tokens: int, frames_per_token: float) -> Tensor:
    edges = torch.arange(tokens + 1, dtype=torch.float64) * (frames_per_token * FRAME_SECONDS)
    return torch.stack([edges[:-1], edges[1:]], 1)
