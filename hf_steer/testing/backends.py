"""What is promised of every way to carry the bias: the same as a dense oracle."""

from __future__ import annotations

import dataclasses
import warnings

from torch import Tensor

from hf_steer.attention import BACKENDS
from hf_steer.config import SteerConfig
from hf_steer.ground.implementations import implementation_of
from hf_steer.patching import make_plan, read_saliency
from hf_steer.testing.compared import within
from hf_steer.testing.oracle import DenseOracle
from hf_steer.testing.report import CannotShow, Finding
from hf_steer.testing.subject import Subject, all_of, largest


def oracle(subject: Subject) -> Finding:
    """Through every backend that knows the implementation's masks."""
    attention = subject.attention
    if attention.phase_factors != (1.0, 1.0, 1.0) or attention.gate is not None or attention.saliency.preserve_mass:
        raise CannotShow("the oracle adds λ·s for every query; this gaze has a scope, a schedule, a gate, or preserves mass")
    if not subject.copies:
        raise CannotShow("the oracle is a copy of the model, and copies=False")
    strengths = make_plan(subject.model, subject.gaze).strengths
    scores = read_saliency(subject.model, subject.inputs, saliency=attention.saliency, given=subject.said).scores.values
    dense = DenseOracle(subject.model)
    own = largest(subject.of_real(subject.plain - dense.logits(subject.inputs, {}, scores)))
    expected = subject.of_real(dense.logits(subject.inputs, strengths, scores))
    return all_of(*(_through(backend, subject, expected, own) for backend in _backends(subject)))


def _through(backend: str, subject: Subject, expected: Tensor, own: float) -> Finding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that gives way to another says so
        with subject.patched(SteerConfig(attention=dataclasses.replace(subject.attention, backend=backend))):
            found = subject.of_real(subject.logits(subject.said))
    return within(subject, found, expected, own, note=f"backend {backend!r}")


def _backends(subject: Subject) -> list[str]:
    """Flex needs a compiler, and the whole model's masks are made for it where it runs."""
    implementation = implementation_of(subject.anatomy.decoder.config)
    able = [name for name, row in BACKENDS.items() if implementation in row.over]
    return ["auto", *(name for name in able if name != "flex" or implementation == "flex_attention")]
