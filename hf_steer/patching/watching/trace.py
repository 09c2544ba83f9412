"""What the gates did, step by step, for those who want to see."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_steer.config.attention import PHASES
from hf_steer.errors import SaliencyError
from hf_steer.gates import normalised_entropy
from hf_steer.patching.gaze.when import logits_of
from hf_steer.patching.passes import Pass
from hf_steer.patching.planned import Strengths
from hf_steer.patching.scopes import Listener, listen


@dataclass(frozen=True)
class TraceStep:
    """One generated token.

    Attributes:
        step: number of the token, from 0.
        phase: `"thinking"` or `"answer"`; always `"answer"` where the configuration does not read think tags.
        gate: how far the gate was open for the query that it came out of, in [0, 1]; 1 without a gate.
        strength: effective λ: the mean over the steered heads, times phase factor and gate. NaN where a share of attention is kept.
        entropy: of the distribution that it was drawn from, normalised to [0, 1].
    """

    step: int
    phase: str
    gate: float
    strength: float
    entropy: float


class Trace(Listener):
    """What `trace_steering` collects: one entry per measured query, `(rows,)` each, still on the model's device."""

    follows_steps = True

    def __init__(self) -> None:
        self.gates: list[Tensor] = []
        self.factors: list[Tensor] = []
        self.phases: list[Tensor] = []
        self.entropies: list[Tensor] = []
        self.strengths: list[float | Tensor] = []

    def generated(self, current: Pass, logits: Tensor, strengths: Strengths) -> None:
        """Take one pass; a piece of a prompt that nothing is generated out of is left out."""
        taken = current.pace
        if taken is None or not taken.measures or taken.phase is None:
            return
        strength = mean_strength(strengths)
        for place, column in enumerate(taken.columns):
            chosen = column[:, None]
            ones = torch.ones_like(column, dtype=torch.float32)
            self.gates.append(ones if taken.gate is None else taken.gate.gather(1, chosen)[:, 0])
            self.factors.append(ones if taken.factor is None else taken.factor.gather(1, chosen)[:, 0])
            self.phases.append(taken.phase.gather(1, chosen)[:, 0])
            self.entropies.append(normalised_entropy(logits_of(taken, logits, place)))
            self.strengths.append(strength)

    def steps(self, row: int = 0, *, beams: Tensor | None = None) -> list[TraceStep]:
        """One row's tokens in their order.

        Args:
            row: of the batch that the decoder saw (with beams or `num_return_sequences`, of the repeated one).
            beams: `beam_indices` of the output of a beam search, `(sequences, tokens)`; `row` then counts its sequences.

        Raises:
            SaliencyError: a row that is not there.
        """
        rows = 0 if not self.gates else len(self.gates[0])
        count = rows if beams is None else len(beams)
        if not 0 <= row < count:
            raise SaliencyError(f"no row {row} in this trace; it has {count}, from 0" + ("." if rows else ": no call was steered."))
        steps = []
        for step in range(len(self.gates)):
            place = row if beams is None else int(beams[row, step]) if step < beams.shape[1] else -1
            if place < 0:  # this sequence has ended
                break
            steps.append(
                TraceStep(
                    step=step,
                    phase=PHASES[int(self.phases[step][place])],
                    gate=float(self.gates[step][place]),
                    strength=float(self.strengths[step]) * float(self.factors[step][place]),
                    entropy=float(self.entropies[step][place]),
                )
            )
        return steps


def trace_steering(model: Any) -> AbstractContextManager[Trace]:
    """Write down gate, phase, effective λ and entropy of every token that this model generates inside the block, in this thread.

    Args:
        model: a patched model that steers heads.

    Returns:
        A block that gives a `Trace`, filled as the model runs; `hf_steer.analysis.plots.plot_trace` draws it. One block per call
        of `generate`.

    Raises:
        PatchError: the model is not patched.
    """
    return listen(model, Trace())


def mean_strength(strengths: Strengths) -> float | Tensor:
    """Mean λ over the heads that have one."""
    values = [torch.as_tensor(value, dtype=torch.float32) for value in strengths.values()]
    if not values:
        return 0.0
    every = torch.cat([value.detach().reshape(-1).to(values[0].device) for value in values])
    return every.sum() / (every != 0).sum().clamp(min=1)
