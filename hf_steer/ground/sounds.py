"""What transformers says of sounds: how many tokens its encoders make of how many mel frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.ground.arguments import Given
from hf_steer.ground.parts import Anatomy
from hf_steer.ground.settings import setting


def count_tokens(anatomy: Anatomy, frames: Tensor) -> list[int]:
    """Tokens of sounds with so many real mel frames."""
    tower: Any = anatomy.encoders["audio"].tower
    return tower._get_feat_extract_output_lengths(frames)[1].tolist()  # type: ignore[no-any-return]


def window_of(anatomy: Anatomy) -> tuple[int, int]:
    """Mel frames, and tokens, of an encoder that always hears a full window and puts several of its steps into a token."""
    config = setting(anatomy.root.config, "audio")
    steps = setting(config, "window_steps")
    return 2 * steps, steps * setting(config, "features") // setting(config, "inner_features")


COUNTED = ("mel_mask", "frame_mask", "sample_mask", "sample_counts", "sound_tokens")
"""Words for what tells how long sounds are."""


def sounds_came(given: Given) -> bool:
    """Whether a call says how long its sounds are."""
    return any(getattr(given, word) is not None for word in COUNTED)


def count_steps(given: Given, word: str) -> list[tuple[int, bool]] | None:
    """Of each sound of a call, how many of its steps are real, and whether all of its row are; None where no sound came.

    Args:
        given: arguments of the call.
        word: our word for a mask of the steps, `(sounds, steps)`, or for their numbers, `(sounds,)`.
    """
    told = getattr(given, word)
    if told is None:
        return None
    told = torch.as_tensor(told)
    if told.ndim == 1:
        return [(int(count), False) for count in told]
    return [(int(count), int(count) == told.shape[-1]) for count in told.sum(-1)]


def strides_of(encoder: nn.Module) -> tuple[int, float] | None:
    """Of an encoder that begins with convolutions over time (Whisper, Moonshine): steps of its input from one place to the next,
    and the step on which the middle of the first lies; None for other encoders."""
    convolutions = [module for module in encoder.children() if isinstance(module, nn.Conv1d)]
    stride, middle = 1, 0.0
    for own in convolutions:
        middle += stride * ((own.kernel_size[0] - 1) / 2 - int(own.padding[0]))
        stride *= own.stride[0]
    return (stride, middle) if convolutions else None


def chunk_of(anatomy: Anatomy) -> int:
    """Mel frames after which the convolutions of a Qwen begin anew."""
    return 2 * int(setting(setting(anatomy.root.config, "audio"), "half_window"))


def joined_steps(anatomy: Anatomy) -> int:
    """How many steps of the encoder are joined to a token."""
    return int(setting(anatomy.root.config, "joined_steps"))


def tokens_a_sound(anatomy: Anatomy) -> int:
    """How many tokens the prompt has for every sound."""
    return int(setting(anatomy.root.config, "tokens_a_sound"))


def hop_of(anatomy: Anatomy) -> int:
    """Samples that a token of a codec stands for."""
    return int(setting(setting(anatomy.root.config, "codec"), "hop"))


def samples_a_token(anatomy: Anatomy) -> int:
    """Samples that a token stands for, where the ear reads samples."""
    return int(setting(setting(anatomy.root.config, "audio"), "samples_a_token"))


def queries_of(anatomy: Anatomy) -> tuple[int, int]:
    """Steps of the encoder in a stretch, and queries to each stretch."""
    steps = int(setting(anatomy.root.config, "stretch_steps"))
    return steps, steps // int(setting(anatomy.root.config, "steps_a_query"))
