"""What transformers says of sounds: how many tokens its encoders make of how many mel frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor

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
