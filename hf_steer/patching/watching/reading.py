"""What a model would look at: the saliency of a prompt, read without running the decoder to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hf_steer.patching.passes import Pass
from hf_steer.patching.scopes import Enough, Listener
from hf_steer.saliency import Saliency, map_of
from hf_steer.values import Span, TokenScores


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


class Preview(Listener):
    """Takes what the steering finds in the first call inside the block, which ends there.

    Attributes:
        found: that; None before.
    """

    def __init__(self) -> None:
        self.found: SaliencyReading | None = None

    def scored(self, current: Pass) -> None:
        """Take the scores of a prompt and end the pass."""
        if current.state is not None and current.raw is not None:
            self.found = SaliencyReading(current.raw, current.state.scores, current.state.spans)
            raise Enough
