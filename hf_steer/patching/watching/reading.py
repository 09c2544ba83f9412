"""What a model would look at: the saliency of a prompt, read without running the decoder to its end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_steer.patching.blocks import Block, held
from hf_steer.patching.gaze.runtime import Ride
from hf_steer.patching.scopes import Enough
from hf_steer.saliency import Saliency, map_of
from hf_steer.values import Span, TokenScores

READING = "reading"
"""A kind of block."""


@dataclass(frozen=True)
class SaliencyReading:
    """The saliency of one prompt.

    Attributes:
        raw: scores as the source gives them, `(batch, tokens)`.
        scores: the same, normalised as configured.
        spans: pictures, videos and sounds of the prompt.
    """

    raw: TokenScores
    scores: TokenScores
    spans: tuple[Span, ...]

    def saliency(self) -> Saliency:
        """The normalised scores as a statement, to be used with `normalize="none"`, or combined with others."""
        return Saliency.from_tokens(self.scores.values.cpu())

    def maps(self, *, sizes: Mapping[tuple[int, int], tuple[int, int]] | None = None) -> dict[tuple[str, int, int], Tensor]:
        """`(modality, row, index)` -> raw scores of a picture, video or sound over its whole extent.

        Args:
            sizes: `(row, index)` -> `(width, height)` of original pictures, where the model's inputs do not tell them.

        Returns:
            `(frames, height, width)` float32; a sound has one frame of height 1.
        """
        known = sizes or {}
        return {
            (span.modality, span.row, span.index): map_of(
                self.raw.values[span.row, span.positions].cpu(), span.layout, known.get((span.row, span.index))
            )
            for span in self.spans
        }


def reading(steering: Any) -> AbstractContextManager[list[SaliencyReading]]:
    """What the steering finds in the calls inside the block, which end there."""
    return Block(steering, READING, [])


def tell_reader(steering: object, ride: Ride) -> None:
    """If somebody only wants to know the saliency, hand it over and end the pass."""
    found: list[SaliencyReading] | None = held(steering, READING)
    if found is not None and ride.state is not None and ride.raw is not None:
        found.append(SaliencyReading(ride.raw, ride.state.scores, ride.state.spans))
        raise Enough
