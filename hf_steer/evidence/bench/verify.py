"""Right before fast: every contender against float64, its error in units of the plain model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_steer.evidence.bench import decoder_calls
from hf_steer.evidence.bench.attention_stage import AttentionStage
from hf_steer.evidence.bench.contenders import Contender
from hf_steer.evidence.bench.decoder_stage import DecoderStage
from hf_steer.evidence.bench.timing import Call

_LEAST_EPS = 0.25
"""Of the type's epsilon: rounding the result alone makes a relative error of about this size."""

Stage = AttentionStage | DecoderStage


class Verifier:
    """What a stage should give, and how far off the plain model is."""

    def __init__(self, stage: Stage, plain: Call) -> None:
        self.stage = stage
        self._exact: dict[tuple[bool, bool], tuple[Tensor, ...]] = {}
        dtype = (stage.query if isinstance(stage, AttentionStage) else stage.hidden).dtype
        least = _LEAST_EPS * torch.finfo(dtype).eps
        self.floor = [max(least, error) for error in self._errors(plain, steers=False, flat=False)]

    def error_ratio(self, contender: Contender, call: Call) -> float:
        """The worst over the results and gradients of a call: its relative error (2-norm) over the plain model's."""
        found = self._errors(call, steers=contender.steers, flat=contender.flat)
        return max(error / floor for error, floor in zip(found, self.floor, strict=True))

    def _errors(self, call: Call, *, steers: bool, flat: bool) -> list[float]:
        result = call.result()
        given = self.stage.outcome(result) if isinstance(self.stage, AttentionStage) else result
        wanted = self._wanted(steers=steers, flat=flat)
        return [_relative(value, exact) for value, exact in zip(given, wanted, strict=True)]

    def _wanted(self, *, steers: bool, flat: bool) -> tuple[Tensor, ...]:
        if (steers, flat) not in self._exact:
            stage = self.stage
            exact: Any = stage.exact if isinstance(stage, AttentionStage) else lambda **how: decoder_calls.exact(stage, **how)
            self._exact[steers, flat] = tuple(value.detach() for value in exact(steered=steers, flat=flat))
        return self._exact[steers, flat]


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact).norm() / exact.norm())
