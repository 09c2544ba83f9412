"""Recordings for an ear: which are trained on and which reported, and what a frozen Whisper makes of each, kept on disk."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from recordings import Recording
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoModel
from words import normal_words

from hf_steer.analysis.provenance import content_hash

FRAMES_PER_SECOND = 50
STACKED = 4
"""Frames of which the composed model makes one token."""
LONGEST_SECONDS, FEWEST_WORDS = 6.0, 3


@dataclass(frozen=True)
class Sound:
    """What the frozen ear made of a recording.

    Attributes:
        text: what is said, in small letters, without punctuation.
        states: `(frames, features)`, a multiple of `STACKED` frames.
    """

    text: str
    states: torch.Tensor

    @property
    def tokens(self) -> int:
        """That it takes in a prompt."""
        return len(self.states) // STACKED


def spoken(text: str) -> str:
    """Small letters and figures; no punctuation but apostrophes."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def divide(recordings: Sequence[Recording], *, report: int, choosing: int, seed: int = 0) -> dict[str, list[Recording]]:
    """Recordings for training, choosing and the report, by what is said: no text is in two of them.

    Reported on and chosen by are phrases of at least three words, each text once. Single words and letters are only trained on:
    one that was never heard cannot be guessed. Longer recordings than six seconds are left out.
    """
    by_text: dict[str, list[Recording]] = {}
    for one in recordings:
        words = normal_words(one.text)
        if words and spoken(one.text) and one.seconds <= LONGEST_SECONDS:
            by_text.setdefault(" ".join(words), []).append(one)
    texts = sorted(by_text)
    phrases = [text for text in texts if len(text.split()) >= FEWEST_WORDS]
    drawn = [phrases[place] for place in np.random.default_rng(seed).permutation(len(phrases))]
    apart = {"report": drawn[:report], "choosing": drawn[report : report + choosing]}
    parts = {name: [by_text[text][0] for text in own] for name, own in apart.items()}
    rest = set(texts) - {text for own in apart.values() for text in own}
    return {"training": [one for text in texts if text in rest for one in by_text[text]], **parts}


def hear(ear: Path, recordings: Sequence[Recording], cache: Path, *, batch: int = 8) -> list[Sound]:
    """What the encoder makes of each recording, now or in a run before.

    It hears the whole window that it was trained with, as its own decoder would have it, since a window that is cut to the sound
    makes that decoder repeat itself without end. Only the states that lie on the sound are kept: positions are counted from the
    beginning of the window, and those of the silence after the sound take no place in the prompt.
    """
    folder = cache / f"ear-states-{content_hash([ear.name, (ear / 'config.json').read_text()])}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{'-'.join(one.path.parts[-2:])}.pt" for one in recordings]
    missing = [place for place, path in enumerate(paths) if not path.is_file()]
    if missing:
        extractor = AutoFeatureExtractor.from_pretrained(ear)
        encoder = AutoModel.from_pretrained(ear, dtype=torch.bfloat16).get_encoder().eval()
        for start in tqdm(range(0, len(missing), batch), desc="hearing", leave=False):
            places = missing[start : start + batch]
            samples = [recordings[place].samples() for place in places]
            mel = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
            with torch.inference_mode():
                states = encoder(mel.to(torch.bfloat16)).last_hidden_state
            for place, own in zip(places, states, strict=True):
                torch.save(own[: frames_of(recordings[place].seconds)].clone(), paths[place])
    return [Sound(spoken(one.text), torch.load(path)) for one, path in zip(recordings, paths, strict=True)]


def frames_of(seconds: float) -> int:
    """Of a sound, filled up to whole tokens."""
    return STACKED * math.ceil(seconds * FRAMES_PER_SECOND / STACKED)
