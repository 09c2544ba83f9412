"""Sounds from WAV files, at the rate that a model listens with."""

from __future__ import annotations

import math
import os
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_steer.errors import FileError

_TYPES: Mapping[int, str] = {1: "u1", 2: "<i2", 4: "<i4"}
"""Bytes of a sample -> its type."""
_MOST_SECONDS = 3600


def read_wav(path: str | os.PathLike[str], rate: int) -> np.ndarray[Any, Any]:
    """Samples of a WAV file of whole numbers, channels averaged, resampled.

    Args:
        path: of the file.
        rate: samples per second that are wanted.

    Returns:
        `(samples,)` float32 from -1 to 1.

    Raises:
        FileError: no such file, or none of that kind.
    """
    source = Path(path)
    try:
        with wave.open(str(source), "rb") as file:
            width, channels, own, count = file.getsampwidth(), file.getnchannels(), file.getframerate(), file.getnframes()
            if width not in _TYPES or not count or count > _MOST_SECONDS * own:
                raise FileError(
                    f"{str(source)!r} has {count} samples of {8 * width} bits; sounds are WAV files of 8, 16 or 32 bits and at "
                    f"most {_MOST_SECONDS} seconds. Convert it: ffmpeg -i {source.name} -c:a pcm_s16le sound.wav"
                )
            content = file.readframes(count)
            if len(content) != count * channels * width:
                raise FileError(
                    f"{str(source)!r} is cut off: it says that it has {count} samples, and {len(content) // (channels * width)} "
                    "are there. Copy it again."
                )
            raw = np.frombuffer(content, _TYPES[width]).astype(np.float64)
    except (OSError, EOFError, wave.Error) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"{str(source)!r} cannot be read as a WAV file ({error}). Convert it: ffmpeg -i {source.name} -c:a pcm_s16le sound.wav"
        ) from error
    whole = float(2 ** (8 * width - 1))
    samples = ((raw - (whole if width == 1 else 0)) / whole).reshape(-1, channels).mean(1)
    return resampled(samples, own, rate).astype(np.float32)


def resampled(samples: np.ndarray[Any, Any], own: int, wanted: int) -> np.ndarray[Any, Any]:
    """Samples at another rate: what is above half of the lower rate is left out, the rest is exact for a sound that repeats."""
    if own == wanted:
        return samples
    count = math.ceil(len(samples) * wanted / own)
    spectrum = np.fft.rfft(samples)
    kept = np.zeros(count // 2 + 1, dtype=complex)
    shared = min(len(spectrum), len(kept))
    kept[:shared] = spectrum[:shared]
    return np.fft.irfft(kept, count) * (count / len(samples))
