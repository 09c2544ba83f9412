"""How the tokens of a sound follow one another, family by family, counted in steps of what the encoder reads.

Convolutions with a stride alone put a token's middle on its first step; where steps are joined or averaged after them, a token
begins with its first step. Attention in the encoder may carry more into a token than it hears itself; that is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from hf_steer.ground import sounds
from hf_steer.ground.arguments import Given
from hf_steer.ground.parts import Anatomy
from hf_steer.values import Layout

MEL_SECONDS = 0.01


@dataclass(frozen=True)
class Ear:
    """What the tokens of a family hear.

    Attributes:
        steps: how many of what is counted make a token.
        step_seconds: what one of them stands for.
        counted: our word for the argument that says how many are real: a mask of them, or their number.
        rest: how many that are left over make one more token; 0 where there is one more in any case.
        centred: a token lies around its first step, half of it before.
        behind_seconds: how far the middle of the first step lies behind the beginning of the sound, where `centred`.
        window: steps after which the convolutions begin anew; None where they never do.
        sharing: how many tokens hear the same steps.
        over_seconds: by how much a sound may be longer than what is counted.
        most_seconds: what is longer is cut by the processor.
        long: a full row goes on in the next one.
        tokens: how many the prompt has whatever the sound's length, the last ones without a place; None for as many as it needs.
    """

    steps: int
    step_seconds: float = MEL_SECONDS
    counted: str = "mel_mask"
    rest: int = 1
    centred: bool = False
    behind_seconds: float = 0.0
    window: int | None = None
    sharing: int = 1
    over_seconds: float = 0.0
    most_seconds: float = math.inf
    long: bool = False
    tokens: int | None = None

    def layout(self, count: int, *, full: bool) -> Layout:
        """Of a sound with so many real steps; `full` where its row has no padding."""
        counted_seconds = count * self.step_seconds
        seconds = counted_seconds + self.over_seconds
        cut = (self.long and full) or seconds >= self.most_seconds
        slack = math.inf if cut else self.step_seconds + self.over_seconds
        cells = self._cells(count, seconds).repeat_interleave(self.sharing, 0)
        if self.tokens is not None:
            cells = torch.cat([cells, cells.new_full((max(0, self.tokens - len(cells)), 2), torch.nan)])[: self.tokens]
        return Layout(cells=cells, size=(seconds,), slack=slack, continues=self.long and full)

    def _cells(self, count: int, seconds: float) -> Tensor:
        """`(tokens, 2)` seconds, without gaps; the last one ends with the sound if what is left over makes a token."""
        window = self.window or max(count, 1)
        token = self.steps * self.step_seconds
        before = self.behind_seconds - token / 2 if self.centred else 0.0
        starts: list[float] = []
        end = 0.0
        for first in range(0, count, window):
            steps = min(window, count - first)
            own = (steps + self.steps - self.rest) // self.steps
            starts += [first * self.step_seconds + max(0.0, place * token + before) for place in range(own)]
            end = first * self.step_seconds + own * token
        edges = torch.tensor([*starts, seconds if self.rest <= 1 else end], dtype=torch.float64)
        return torch.stack([edges[:-1], edges[1:]], 1)


def heard(given: Given, ear: Ear) -> dict[str, list[Layout]]:
    """One layout per row of a call's sounds."""
    counts = sounds.count_steps(given, ear.counted)
    return {} if counts is None else {"audio": [ear.layout(count, full=full) for count, full in counts]}


def places_between(start_seconds: float, end_seconds: float, *, places: int, step_seconds: float, first_seconds: float) -> range:
    """Which places of what an encoder hands on a stretch of the sound covers: those whose middle lies in it, or the nearest one.

    Args:
        start_seconds: of the stretch.
        end_seconds: of the stretch.
        places: how many the encoder hands on.
        step_seconds: from the middle of one place to the next.
        first_seconds: where the middle of the first one lies (`ground.sounds.strides_of` gives both).
    """
    first = math.ceil((start_seconds - first_seconds) / step_seconds)
    last = math.ceil((end_seconds - first_seconds) / step_seconds)
    if first == last:  # shorter than a step
        first = round(((start_seconds + end_seconds) / 2 - first_seconds) / step_seconds)
        last = first + 1
    return range(min(max(first, 0), places - 1), max(min(last, places), 1))


EARS: Mapping[str, Callable[[Anatomy], Ear]] = MappingProxyType(
    {
        # strides, then steps joined or averaged
        "qwen2_5_omni": lambda anatomy: Ear(steps=4, rest=3),
        "musicflamingo": lambda anatomy: Ear(steps=4, rest=3, long=True),
        "glmasr": lambda anatomy: Ear(steps=8, rest=7, long=True),
        "moss_transcribe_diarize": lambda anatomy: Ear(steps=2 * sounds.joined_steps(anatomy), long=True),
        # strides alone
        "qwen3_omni": lambda anatomy: Ear(steps=8, centred=True, window=sounds.chunk_of(anatomy)),
        "gemma4_audio": lambda anatomy: Ear(steps=4, centred=True, over_seconds=0.01, most_seconds=30.0),
        "phi4_multimodal": lambda anatomy: Ear(
            steps=1, step_seconds=0.08, counted="sound_tokens", centred=True, behind_seconds=0.0125, over_seconds=0.025
        ),
        "nemotron_h_omni": lambda anatomy: Ear(steps=8, centred=True, rest=0, over_seconds=0.01),
        "dots3_note_audio": lambda anatomy: Ear(steps=1280, step_seconds=1 / 16000, counted="sample_counts", centred=True),
        # every fourth of what strides of four have left
        "gemma3n_audio": lambda anatomy: Ear(steps=16, over_seconds=0.04, most_seconds=30.0, tokens=sounds.tokens_a_sound(anatomy)),
        # frames as they are, stacks of them, or of samples
        "inkling_audio": lambda anatomy: Ear(steps=1, step_seconds=0.05, counted="frame_mask", centred=True),
        "fun_asr_nano": lambda anatomy: Ear(steps=1, step_seconds=0.06, centred=True, behind_seconds=0.0125, over_seconds=0.025),
        "gemma4_unified_audio": lambda anatomy: Ear(steps=1, step_seconds=0.04, most_seconds=30.0),
        "vibevoice_asr": lambda anatomy: Ear(steps=sounds.hop_of(anatomy), step_seconds=1 / 24000, counted="sample_mask"),
        "muse_spark_audio": lambda anatomy: Ear(
            steps=sounds.samples_a_token(anatomy), step_seconds=1 / 24000, counted="sample_mask"
        ),
        # queries to the same stretch
        "granite_speech": lambda anatomy: _queries(*sounds.queries_of(anatomy)),
    }
)
"""Row of `saliency.LAYOUTS` -> from a model's anatomy to its ear."""


def _queries(steps: int, queries: int) -> Ear:
    """So many of Granite's encoder steps, of two mel frames each, in a stretch, and queries to it; its mask counts the queries."""
    seconds = 2 * MEL_SECONDS * steps
    return Ear(steps=queries, step_seconds=seconds / queries, sharing=queries, over_seconds=MEL_SECONDS)
