"""Recordings with what is said in them: a folder of 16 kHz WAV files and `transcripts.tsv` (file, seconds, text)."""

import csv
import gzip
import io
import re
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RATE_HZ = 16_000
FULL_SCALE = 32768.0


@dataclass(frozen=True)
class Recording:
    """One file and what is said in it.

    Attributes:
        path: WAV, mono, 16 bit, 16 kHz.
        seconds: its length.
        text: as its publisher wrote it.
    """

    path: Path
    seconds: float
    text: str

    def samples(self):
        """Between -1 and 1, float32."""
        return read_wav(self.path.read_bytes())


def read_wav(content):
    """Samples between -1 and 1 at 16 kHz, float32, of a mono WAV of 16 bits."""
    with wave.open(io.BytesIO(content)) as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise ValueError(f"{file.getnchannels()} channels of {8 * file.getsampwidth()} bits; mono of 16 bits is read")
        found = np.frombuffer(file.readframes(file.getnframes()), "<i2") / FULL_SCALE
        return resampled(found, file.getframerate()).astype(np.float32)


def resampled(samples, rate_hz):
    """At 16 kHz, by zeros (or a cut) in the spectrum."""
    if rate_hz == RATE_HZ:
        return samples
    length = round(len(samples) * RATE_HZ / rate_hz)
    return np.fft.irfft(np.fft.rfft(samples), length) * (length / len(samples))


def write_wav(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(np.clip(np.round(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype("<i2").tobytes())


def read_recordings(folder):
    """All recordings of a folder that `fetch.py` made, in the order of its `transcripts.tsv`."""
    folder = Path(folder)
    if not (folder / "transcripts.tsv").is_file():
        raise SystemExit(f"{folder} holds no transcripts.tsv; python examples/real/fetch.py makes it")
    with open(folder / "transcripts.tsv", encoding="utf-8", newline="") as file:
        return [Recording(folder / row["file"], float(row["seconds"]), row["text"]) for row in csv.DictReader(file, delimiter="\t")]


def write_recordings(folder, found):
    """WAV files and their `transcripts.tsv`.

    Args:
        folder: empty.
        found: triples of name (without ending), samples at 16 kHz, text.
    """
    with open(folder / "transcripts.tsv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["file", "seconds", "text"])
        for name, samples, text in found:
            write_wav(folder / f"{name}.wav", samples)
            writer.writerow([f"{name}.wav", f"{len(samples) / RATE_HZ:.3f}", text])


def phrases_in(text):
    """Names and transcripts of Asterisk's list: `name: words`. Remarks in brackets are no speech and are left out."""
    for line in gzip.decompress(text).decode("utf-8").splitlines():
        name, colon, words = line.partition(":")
        words = " ".join(re.sub(r"\[.*?\]|<.*?>|\(.*?\)", " ", words).split())
        if colon and words and not line.startswith(";"):
            yield name.strip(), words


def transcription_in(text):
    """Names and transcripts of Sphinx's list: `<s> words </s> (name)`."""
    for words, name in re.findall(r"<s>\s*(.*?)\s*</s>\s*\((\S+)\)", text.decode("utf-8")):
        yield name, words
