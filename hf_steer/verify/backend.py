"""Whether the way in which the bias is carried gives what the formula says, on sampled heads of real passes."""

from __future__ import annotations

from typing import Any

import torch

from hf_steer.testing.compared import TIMES_PLAIN
from hf_steer.testing.report import CannotShow, Finding
from hf_steer.verify.exact import attend_exactly, distance
from hf_steer.verify.receipt import waits
from hf_steer.verify.sampling import Sample, Sampler
from hf_steer.verify.subjects import PLAIN, STEERED

EPSILONS = 2
"""Of the type, relative: rounding the weights and the result; and half of one more for each unit of the largest bias, which is
itself rounded to the type where it is added to a mask."""
MOST_OF_PLAIN = 16
"""Epsilons: a plain head that is further from the formula does not compute that formula."""


def backend(subject: Any) -> Finding:
    """In the prompt and in the steps after it, which may be carried in another way."""
    subject.generate()
    with subject.patched(subject.gaze):
        subject.generate(subject.said)
    before, after = (_read(subject.memory.samplers[how]) for how in (PLAIN, STEERED))
    own = max(distance(sample.output, attend_exactly(sample, steered=False)) for sample in before)
    epsilon = max(torch.finfo(sample.dtype).eps for sample in after)
    if own > MOST_OF_PLAIN * epsilon:
        raise CannotShow(f"the unpatched model's own heads are {own:.2g} from the formula, so they compute another one")
    steered = [sample for sample in after if sample.bias is not None]
    if not steered and waits(subject):
        raise CannotShow("its scope, schedule or gate lets nothing of this prompt and its first tokens be steered")
    if not steered:
        return Finding(False, note="no sampled head was steered")
    reach = max(float(sample.bias.abs().max()) for sample in steered if sample.bias is not None)
    bar = TIMES_PLAIN * own + epsilon * (EPSILONS + reach / 2)
    exact = [attend_exactly(sample, steered=True) for sample in steered]
    errors = [distance(sample.output, expected) for sample, expected in zip(steered, exact, strict=True)]
    effect = max(
        distance(attend_exactly(sample, steered=False), expected) for sample, expected in zip(steered, exact, strict=True)
    )
    if effect <= bar:
        raise CannotShow(f"what steering changes in the sampled heads, {effect:.2g}, is no more than rounding")
    layers = sorted({sample.layer for sample in steered})
    note = f"{len(steered)} heads of layers {', '.join(map(str, layers))}; steering changes them by up to {effect:.2g}"
    worst = max(errors)
    return Finding(worst <= bar, worst, bar, note)


def _read(sampler: Sampler) -> list[Sample]:
    if sampler.failed is not None:
        raise CannotShow(sampler.failed)
    if not sampler.samples:
        raise CannotShow("no attention was seen: this model does not call it where it can be watched")
    return sampler.samples
