"""Whether what was asked for has arrived: a bias in the heads that were named and in no others, and another output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_steer.ground.longform import goes_by_stretches
from hf_steer.testing.compared import bar_for
from hf_steer.testing.generation import while_alike
from hf_steer.testing.passes import applied_in
from hf_steer.testing.report import CannotShow, Finding
from hf_steer.testing.subject import largest
from hf_steer.verify.sampling import Sampler
from hf_steer.verify.subjects import PLAIN, STEERED


def receipt(subject: Any) -> Finding:
    """Seen where attention is computed, in all layers, in the prompt and in the steps after it."""
    plain = subject.generate()
    with subject.patched(subject.gaze):
        answer, prompt = subject.generate(subject.said), subject.logits(subject.said)
    named = {layer: tuple(head for head, value in enumerate(values) if value) for layer, values in subject.strengths.items()}
    wrong = None if subject.unread is not None else _astray(subject, named)
    if wrong is not None:
        return Finding(False, note=wrong)
    change = max(largest(subject.of_real(prompt - subject.plain)), largest(torch.sub(*while_alike(answer, plain))))
    least = bar_for(subject, subject.plain, 0.0)
    if not change > least:
        return Finding(False, note=f"largest change of a logit {change:.3g}; rounding makes up to {least:.3g}")
    one = next(site for site in subject.anatomy.layers if site.index in named)
    lost = applied_in(subject, [one])
    heads = sum(map(len, named.values()))
    note = f"{heads} heads in {len(named)} layers; largest change of a logit {change:.3g}; rounding makes up to {least:.3g}"
    unseen = "" if subject.unread is None else f"; head by head it is not seen: {subject.unread}"
    return lost if not lost.holds else Finding(True, note=f"{note}{unseen}")


def _astray(subject: Any, named: Mapping[int, tuple[int, ...]]) -> str | None:
    """What is wrong with what was handed to the layers; None where nothing is.

    Raises:
        CannotShow: nothing was to be steered in these passes.
    """
    before: Sampler = subject.memory.samplers[PLAIN]
    sampler: Sampler = subject.memory.samplers[STEERED]
    found = {layer: heads for layer, heads in sampler.biased.items() if heads}
    if any(before.biased.values()):
        return "without steering a bias was handed to layers"
    if not found and waits(subject):
        raise CannotShow("its scope, schedule or gate lets nothing of this prompt and its first tokens be steered")
    if found != named:
        layers = [layer for layer in {**named, **found} if named.get(layer) != found.get(layer)]
        return f"layers {layers}: named heads {named.get(layers[0])}, steered {found.get(layers[0])}"
    if _says_otherwise(subject, sampler):
        return "what was added to the logits is not λ times the score that was said"
    return None


def waits(subject: Any) -> bool:
    """Whether the gaze may leave a query unsteered by design."""
    attention = subject.attention
    return attention.gate is not None or attention.phase_factors != (1.0, 1.0, 1.0)


def _says_otherwise(subject: Any, sampler: Sampler) -> bool:
    """Whether the bias is another than `λ · s`; only where scores are said token by token, and added as they are said."""
    saliency, said = subject.attention.saliency, subject.said
    scaled = saliency.normalize != "none" or saliency.preserve_mass or subject.attention.share is not None
    if said is None or said.tokens is None or scaled or waits(subject):
        return False
    return any(not _is_said(subject, sample) for sample in sampler.samples if sample.bias is not None)


def _is_said(subject: Any, sample: Any) -> bool:
    """Whether a sampled bias is `λ` times the scores of its row; in a later stretch of a sound, of some row from some score on."""
    tokens, strength = subject.said.tokens.double(), float(subject.strengths[sample.layer][sample.head])
    if sample.bias.shape[1] != tokens.shape[1]:
        return True  # a step, or a layer with a window

    def is_bias(expected: Tensor) -> bool:
        return torch.allclose(sample.bias, expected.expand_as(sample.bias), rtol=1e-5, atol=1e-6)

    if is_bias(strength * tokens[sample.row] * subject.mask_row(sample.row)):
        return True
    if not goes_by_stretches(subject.anatomy.root):
        return False
    first = sample.bias[0, 0].to(tokens)
    for row in strength * tokens:
        for start in torch.isclose(row, first, rtol=1e-5, atol=1e-6).nonzero().flatten().tolist():
            if is_bias(torch.cat([row[start:], row.new_zeros(start)])):
                return True
    return False
