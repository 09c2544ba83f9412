"""What `generate` of encoder-decoders is called with, and how some decode a long sound, stretch by stretch (Whisper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SEGMENT = "generate_with_fallback"
"""The method that decodes one stretch of each sound of a batch."""
_FRAME_SECONDS = 0.01
_SOURCES = ("inputs", "input_features", "input_values", "input_ids", "pixel_values", "flattened_patches", "inputs_embeds")


def source_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What `generate` is given for an encoder: its first argument, or the first of those with that sense; None without."""
    named = (kwargs.get(name) for name in _SOURCES)
    return next((value for value in (*args[:1], *named) if isinstance(value, Tensor)), None)


def goes_by_stretches(model: Any) -> bool:
    """Whether a model's `generate` does so."""
    return callable(getattr(type(model), SEGMENT, None))


def stretch_in(named: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Of a call of that method: which row of the batch each sound is, and from which second on it is decoded."""
    rows = tuple(int(row) for row in named["batch_idx_map"])
    starts: Tensor = named["seek"]
    return rows, tuple(float(starts[row]) * _FRAME_SECONDS for row in rows)


def rows_in(named: Mapping[str, Any]) -> int:
    """Of a call of that method: rows of the batch, as often as each is decoded."""
    return len(named["seek"])


def seconds_of(mels: Tensor) -> float:
    """How long the sounds of a batch `(rows, mels, frames)` are, padding included."""
    return mels.shape[-1] * _FRAME_SECONDS
