"""Spoken digits, made to order: the small world of the tiny ear.

espeak-ng speaks strings of one to four digits in many voices, in process. Held-out strings and held-out voices are set
apart before anything is spoken, so that neither is ever trained on. The ear itself learns on other words (`sample_words`).
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.signal import resample_poly

SAMPLING_HZ = 16_000
LONGEST_SECONDS = 3
SPLIT_SEED = 20_260_215
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH_SHARES = (0.1, 0.2, 0.3, 0.4)
"""Of strings with one, two, three and four digits."""
SPEEDS_WPM, PITCHES = (150, 231), (30, 71)
"""Half-open ranges; the slowest four digits stay well below `LONGEST_SECONDS`."""
VOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "training": (
            "en-us+m1", "en-us+m3", "en-us+f2", "en-us+f5", "en+m2", "en+m7", "en+f1", "en-gb-scotland+m5", "en-gb-scotland+f2",
            "en-029+m3", "en-029+f1", "en-gb-x-rp+m1", "en-gb-x-rp+f5", "en-gb-x-gbclan+m2", "en-us-nyc+m7", "en-gb-x-gbcwmd+f2",
        ),
        "validation": ("en-us+f3", "en-us+m4", "en+m4", "en+Annie", "en-gb-scotland+f3", "en-029+m4"),
        "held-out": ("en-us+m6", "en-us+f4", "en+f4", "en+m8", "en-gb-scotland+m6", "en-029+f4"),
    }
)
"""Split -> accent and speaker as espeak-ng names them ("en" is British); no speaker is in two splits."""
STRING_SHARES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"training": (0.0, 0.7), "validation": (0.7, 0.8), "held-out": (0.8, 1.0)}
)
"""Split -> its part of the shuffled strings of each length."""
OTHER_TEXT = """
    zebra zone zoom zip hero period serious weary near beer hear clear dear year zoo lazy busy easy music razor
    row rope road hello yellow window follow snow go slow home bone phone stone bowl photo open over ocean arrow
    sun fun run done gun wonder winter water wood wool wing wall week wagon under uncle onion summer hundred money honey
    tool tooth tune tulip tuna moon spoon soon food blue shoe school cool rule fruit juice student
    thread throw throne through thrill thick thin thing thumb thank bath mouth teeth north truth path
    tree free street green queen dream cream read really reason ring red river rain
    fork form fort forest fortune fall fog fox door floor more store horse corner morning sport storm
    fire fight find fine file life knife wife wine drive dive alive arrive voice love leave live van very visit vine
    sick sit sister silver single simple kiss kick fix mix box tax taxi wax books lakes ticks
    send set second several level clever never ever heaven even oven driven raven eleven melon lemon lesson season
    age aim able late gate plate rate state wait weight paper day play name table baby cake
    night nice nose noon nurse nail sign line mine pine shine time light white kite bike ice island
    cat dog bird garden banana apple purple happy pencil better mother father animal hand lamp jacket cherry chair bread
"""
OTHER_WORDS = tuple(OTHER_TEXT.split())
"""What the ear learns on: they hold every sound of the digits, and no digit or homophone of one."""


@dataclass(frozen=True)
class Utterance:
    """One spoken string.

    Attributes:
        digits: what is said, as figures: `"359"`.
        voice: accent and speaker, as in `VOICES`.
        speed_wpm: words per minute, as espeak-ng counts them.
        pitch: 0 to 99, relative to the speaker's own.
        audio: `(samples,)`, float32 in [-1, 1] at `SAMPLING_HZ`.
    """

    digits: str
    voice: str
    speed_wpm: int
    pitch: int
    audio: np.ndarray[Any, Any] = field(repr=False, compare=False)


class Speaker:
    """espeak-ng with its own copy of the library's state; see `speaker`."""

    RATE, PITCH = 1, 3
    SYNCHRONOUS, DO_NOT_EXIT = 2, 0x8000
    UTF8, IPA = 1, 2
    CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def __init__(self, library: ctypes.CDLL, data_path: str, seed: int) -> None:
        self.library = library
        self.spoken: list[np.ndarray[Any, Any]] = []
        self.rate_hz = library.espeak_Initialize(self.SYNCHRONOUS, 0, data_path.encode(), self.DO_NOT_EXIT)
        if self.rate_hz <= 0:
            raise RuntimeError(f"espeak-ng does not start with its data in {data_path!r}")
        self.callback = self.CALLBACK(self.hear)  # kept: ctypes frees a callback that only C still knows
        library.espeak_SetSynthCallback(self.callback)
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p

    def hear(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self.spoken.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def choose(self, voice: str) -> None:
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice!r}; see VOICES for names that it knows")

    def say(self, text: str, *, voice: str, speed_wpm: int, pitch: int) -> np.ndarray[Any, Any]:
        """The sound of `text`, `(samples,)` at `SAMPLING_HZ`.

        Raises:
            ValueError: the voice is unknown, or the sound is longer than `LONGEST_SECONDS`.
        """
        self.spoken.clear()
        self.choose(voice)
        self.library.espeak_SetParameter(self.RATE, speed_wpm, 0)
        self.library.espeak_SetParameter(self.PITCH, pitch, 0)
        encoded = text.encode()
        if self.library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, self.UTF8, None, None):
            raise RuntimeError(f"espeak-ng did not say {text!r}")
        self.library.espeak_Synchronize()
        audio = resample_poly(np.concatenate(self.spoken).astype(np.float64) / 32768, SAMPLING_HZ, self.rate_hz)
        if len(audio) > LONGEST_SECONDS * SAMPLING_HZ:
            raise ValueError(f"{text!r} takes {len(audio) / SAMPLING_HZ:.1f} s, at most {LONGEST_SECONDS} s fit; speak faster")
        return np.clip(audio, -1, 1).astype(np.float32)

    def phonemes(self, word: str) -> tuple[str, ...]:
        """The sounds of `word` in American English, without stress."""
        self.choose("en-us")
        rest = ctypes.c_char_p(word.encode())
        sounds = self.library.espeak_TextToPhonemes(ctypes.byref(rest), self.UTF8, self.IPA | ord("_") << 8).decode()
        return tuple(sound for sound in sounds.replace("ˈ", "").replace("ˌ", "").split("_") if sound)


@contextmanager
def speaker(seed: int = 0) -> Iterator[Speaker]:
    """A speaker that sounds the same every time.

    espeak-ng keeps its noise and the flutter of its pitch in global variables that no call resets, so what it says depends
    on all it has said before. A copy of the library starts afresh, and leaves alone whoever else uses espeak-ng here.

    Raises:
        ImportError: espeakng-loader, whose package carries espeak-ng, is not installed.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError("the speech comes from espeak-ng; install it with: pip install espeakng-loader") from error
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), folder))
        speaking = Speaker(library, espeakng_loader.get_data_path(), seed)
        try:
            yield speaking
        finally:
            library.espeak_Terminate()


def strings_of(split: str, length: int) -> list[str]:
    """The digit strings of that length that belong to a split.

    Raises:
        ValueError: there is no such split.
    """
    if split not in STRING_SHARES:
        raise ValueError(f"no split {split!r}; there are {', '.join(STRING_SHARES)}")
    order = np.random.default_rng((SPLIT_SEED, length)).permutation(10**length)
    first, last = (round(share * len(order)) for share in STRING_SHARES[split])
    return [f"{number:0{length}d}" for number in order[first:last]]


def draw_delivery(random: np.random.Generator, voices: Sequence[str]) -> dict[str, Any]:
    return {
        "voice": voices[int(random.integers(len(voices)))],
        "speed_wpm": int(random.integers(*SPEEDS_WPM)),
        "pitch": int(random.integers(*PITCHES)),
    }


def sample_utterances(split: str, count: int, seed: int) -> list[Utterance]:
    """Spoken digit strings; neither a string nor a speaker of one split occurs in another.

    Args:
        split: `"training"`, `"validation"` or `"held-out"`.
        count: how many.
        seed: the same seed gives the same samples, whatever was spoken before.

    Raises:
        ValueError: there is no such split.
        ImportError: espeakng-loader is not installed.
    """
    strings = [strings_of(split, length) for length in range(1, len(LENGTH_SHARES) + 1)]
    random = np.random.default_rng(seed)
    utterances = []
    with speaker(seed) as speaking:
        for _ in range(count):
            choices = strings[int(random.choice(len(strings), p=LENGTH_SHARES))]
            digits = choices[int(random.integers(len(choices)))]
            delivery = draw_delivery(random, VOICES[split])
            audio = speaking.say(" ".join(DIGIT_WORDS[int(digit)] for digit in digits), **delivery)
            utterances.append(Utterance(digits, **delivery, audio=audio))
    return utterances


def sample_words(split: str, count: int, seed: int, *, longest: int = 3) -> list[tuple[tuple[str, ...], np.ndarray[Any, Any]]]:
    """The neighbouring task: one to `longest` of `OTHER_WORDS` in the voices of a split, with the sound of each sequence."""
    random = np.random.default_rng(seed)
    sequences = []
    with speaker(seed) as speaking:
        for _ in range(count):
            words = tuple(random.choice(OTHER_WORDS, int(random.integers(1, longest + 1))).tolist())
            sequences.append((words, speaking.say(" ".join(words), **draw_delivery(random, VOICES[split]))))
    return sequences


def phonemes_of(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Word -> its sounds, the same for all accents."""
    with speaker() as speaking:
        return {word: speaking.phonemes(word) for word in words}
