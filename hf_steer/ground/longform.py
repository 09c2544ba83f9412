"""Models that transcribe a long sound stretch by stretch, inside one call of `generate`: Whisper and what is built on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SEGMENT = "generate_with_fallback"
"""The method that decodes one stretch of each sound of a batch."""
_FRAME_SECONDS = 0.01


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
