"""From scores, strengths and gates to the bias of every steered layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.attention import head_bias, mass_shift
from hf_steer.ground.caches import past_of
from hf_steer.patching.gaze.memory import CacheState
from hf_steer.patching.planned import Strengths
from hf_steer.values import HeadBias, TokenScores

Place = tuple[int, int]
"""How many keys a layer attends to, and the position of the first."""


class BiasMaker:
    """Makes the biases of one pass; layers with equal strengths that see the same keys share one.

    Args:
        state: for the rows of this pass.
        strengths: layer -> λ per query head.
        places: of each of these layers.
        cache: as the decoder gets it; None without one, and for attention to other keys than those in it.
        queries: tokens of this pass.
        gate: `(rows, queries)`, None for 1 everywhere.
        soon: the same for keys that do not wait for a token to be generated, where the scores tell keys apart.
        share: of attention that what is pointed at shall have; None where strengths say how hard.
    """

    def __init__(
        self,
        state: CacheState,
        strengths: Strengths,
        places: Sequence[Place],
        *,
        cache: Any,
        queries: int,
        gate: Tensor | None,
        soon: Tensor | None = None,
        share: float | None = None,
    ) -> None:
        self.state, self.strengths, self.cache, self.queries = state, strengths, cache, queries
        self.gate, self.soon, self.places, self.share = gate, soon, places, share
        self.windows: dict[Place, tuple[TokenScores, dict[Any, Any]]] = {}
        self.made: dict[tuple[Place, tuple[float, ...] | int], HeadBias] = {}

    def every(self) -> dict[int, HeadBias]:
        """Layer -> bias over the keys that the layer is about to attend to."""
        biases, made = {}, self.made
        for (layer, values), place in zip(self.strengths.items(), self.places, strict=True):
            same = (place, layer if isinstance(values, Tensor) else values)
            biases[layer] = made[same] if same in made else self._make(same, place, values)
        return biases

    def over(self, layer: int, keys: int) -> HeadBias | None:
        """The bias of a layer that attends to other keys than its cache told: those of a layer whose keys it shares.

        None where which they are is not known: no layer sees so many, and all that were cached are more or fewer.
        """
        if self.cache is None:
            return None
        total = int(past_of(self.cache))  # the pass's own are in it by now
        place = next((own for own in ((total, 0), *self.places) if own[0] == keys), None)
        if place is None:
            return None
        values = self.strengths[layer]
        same = (place, layer if isinstance(values, Tensor) else values)
        return self.made[same] if same in self.made else self._make(same, place, values)

    def _make(self, same: tuple[Place, Any], place: Place, values: tuple[float, ...] | Tensor) -> HeadBias:
        if place not in self.windows:
            self.windows[place] = self._window(place), {}
        scores, key_forms = self.windows[place]
        strength, shift = self._strength(values)
        shift = shift if self.share is None else None  # it says how much goes to the span, so nothing keeps its own
        bias = head_bias(scores, strength, shift, self.gate, key_forms, soon=self.soon)
        self.made[same] = bias if self.share is None else replace(bias, share=self.share)
        return self.made[same]

    def _window(self, place: Place) -> TokenScores:
        """Scores of the keys there, 0 for those after the prompt."""
        (length, offset), scores = place, self.state.scores
        missing = max(0, offset + length - scores.values.shape[1])
        keys = slice(offset, offset + length)
        return TokenScores(
            F.pad(scores.values, (0, missing))[:, keys],
            F.pad(scores.group, (0, missing), value=-1)[:, keys],
            scores.groups,
            waits=None if scores.waits is None else F.pad(scores.waits, (0, missing))[:, keys],
        )

    def _strength(self, values: tuple[float, ...] | Tensor) -> tuple[Tensor, Tensor | None]:
        """λ per head as a tensor, and how far each group's bias is shifted to keep its mass.

        The shift comes from all keys of a group, also those that a chunk or a sliding window does not hold. Learned strengths
        change, so nothing is kept of them.
        """
        scores, known = self.state.scores, self.state.tensors
        kept = scores.groups != 0
        if isinstance(values, Tensor):
            return values, mass_shift(scores, values) if kept else None
        if values not in known:
            strength = torch.tensor(values, dtype=torch.float32, device=scores.values.device)
            known[values] = (strength, mass_shift(scores, strength) if kept else None)
        return known[values]
