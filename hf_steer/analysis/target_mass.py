"""The strength that brings a span from its share of attention to another one: in closed form, and then measured and mended.

A query gives a span the share ψ. A bias of λ on the logits of every key in the span, and of none outside, moves its log-odds
`log(ψ/(1-ψ))` by exactly λ. So `λ = log(τ/(1-τ)) - log(ψ/(1-ψ)) = log(τ(1-ψ) / (ψ(1-τ)))` brings it to τ; the often used
`log(τ/ψ)` falls short, since it leaves out that the rest loses what the span gains.

Of several queries the mean share is no function of the mean log-odds, and a layer after a steered one sees other inputs than those
that were measured; and tokens that a box covers in part get a part of λ. So what comes out is measured, and each head's λ is moved
on by what its mean share lacks, by Newton's method: the mean share grows with λ by the mean of ψ(1-ψ). A layer
depends on those before it alone, so one after the other they settle.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_steer.analysis.calibration import attention_with, rows_per_head
from hf_steer.analysis.metrics import attention_metrics
from hf_steer.analysis.metrics_table import AttentionMetrics
from hf_steer.analysis.pointed import covered, scores_in_force
from hf_steer.analysis.prompts import Batch, Inputs, as_batches, last_queries, steered_heads
from hf_steer.analysis.provenance import Provenance, provenance_of
from hf_steer.analysis.tables import as_text
from hf_steer.config import AttentionConfig
from hf_steer.config.checks import check_number
from hf_steer.errors import ConfigError, SaliencyError
from hf_steer.patching import disable_steering, use_strength
from hf_steer.saliency import Saliency

PerHead = Mapping[int, Mapping[int, float]]
MISSED = 0.05
"""Share of the target by which the worst head may miss it for it to be met."""
ENOUGH = 0.01
"""Share at which nothing is mended any more."""
MOST = 24
"""Measurements, unless more layers are steered: each pass settles at least one."""
_LONGEST_STEP = 4.0
"""By which λ is moved at once; where shares are near 0 or 1 their slope says little."""


@dataclass(frozen=True)
class MassStrength:
    """What `strength_for_mass` found, `{layer: {head: value}}` of the steered heads.

    Attributes:
        strength: λ.
        target_mass: what was asked for.
        unsteered_mass: mean share of attention on the span without steering.
        steered_mass: likewise, measured with all of `strength` in force.
        missed_share: by how much `steered_mass` misses the target, as a share of it, in the head where it misses most.
        queries: how many the means are over.
        passes: how often it was measured.
        attention: the model's AttentionConfig with this strength, ready to be patched in.
        provenance: where these numbers come from.
    """

    strength: PerHead
    target_mass: float
    unsteered_mass: PerHead
    steered_mass: PerHead
    missed_share: float
    queries: int
    passes: int
    attention: AttentionConfig
    provenance: Provenance

    def to_json(self) -> str:
        """Everything but `attention`, layers and heads as strings."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "attention"}
        return json.dumps({**values, "provenance": dataclasses.asdict(self.provenance)}, indent=2, default=dict) + "\n"

    def __repr__(self) -> str:
        values = [value for own in self.strength.values() for value in own.values()]
        return (
            f"<MassStrength: λ {min(values):.3g} to {max(values):.3g} in {len(values)} heads for a share of {self.target_mass:g}, "
            f"missed by {self.missed_share:.1%} at most; {self.passes} passes over {self.queries} queries>"
        )

    def __str__(self) -> str:
        rows = rows_per_head(self.strength, {"unsteered share": self.unsteered_mass, "steered share": self.steered_mass})
        met = "is met" if self.missed_share <= MISSED else "is not met"
        return (
            f"{self.target_mass:g} of the attention, in the mean over {self.queries} tokens, {met}: the head that misses most does "
            f"so by {self.missed_share:.1%} of it, after {self.passes} passes.\n\n{as_text(rows)}"
        )


def strength_for_mass(
    model: Any,
    inputs: Inputs | Sequence[tuple[Inputs, Saliency | None]],
    target_mass: float,
    *,
    saliency: Saliency | None = None,
    queries: Tensor | Sequence[Tensor] | None = None,
) -> MassStrength:
    """λ per steered head with which the span's mean share of attention is `target_mass`.

    The span are the tokens that score at least half as high as any in their row: those that a box covers by half, or more. λ comes
    from the closed form, and is mended by what is measured until the head that misses most misses by 1 %, or for as many passes as
    layers are steered and at least 24. `steered_mass` says what comes out with all heads steered, `missed_share` how near that is:
    a box in a picture that keeps its mass gets no more than the picture has.

    Args:
        model: patched so that scores lie between 0 and 1, as what is said does unless the configuration says otherwise
            (`normalize` `"auto"`, `"maxabs"`, `"minmax"` or `"none"`), in eval mode.
        inputs: of a forward pass; or a list of pairs (inputs, Saliency or None).
        target_mass: share of attention, in (0, 1).
        saliency: what is said about a single batch: a box, or 1 for the tokens of the span and 0 elsewhere.
        queries: `(batch, tokens)` bool, of several batches a list: which to take the mean over. None for all that can attend
            to the span and to something else; unless the configuration says `queries="all"`, the last token of each prompt.

    Raises:
        ConfigError: a target outside (0, 1), no prompts, or a configuration that keeps the mass where it is.
        PatchError: the model is not patched, or its configuration steers no head.
        SaliencyError: scores below 0 or above 1, or a span that no query sees.
    """
    heads = steered_heads(model)
    attention = attention_with(model, 1.0)
    _check(target_mass, attention)
    batches = as_batches(inputs, saliency)
    origin = provenance_of(model, batches, seed=0, target_mass=target_mass, queries=queries)
    asked = _queries(batches, queries, generated=attention.queries != "all")
    spans = [marked_tokens(model, batch, min(heads)) for batch in batches]
    with disable_steering(model):
        before = [_measure(model, *each, heads, same_logits=True) for each in zip(batches, spans, asked, strict=True)]
    found = _approach(model, list(zip(batches, spans, asked, strict=True)), before, heads, target_mass)
    strength = _named(found.strength, heads)
    return MassStrength(
        strength=strength,
        target_mass=float(target_mass),
        unsteered_mass=_named(_mean(before, before, "span_mass"), heads),
        steered_mass=_named(found.mass, heads),
        missed_share=found.missed,
        queries=sum(int(_seeing(part)[0, 0].sum()) for part in before),
        passes=found.passes,
        attention=attention_with(model, strength),
        provenance=origin,
    )


@dataclass(frozen=True, eq=False)
class _Reached:
    """λ and what it brings, `(layers, heads)` each; and by how much the worst steered head misses."""

    strength: Tensor
    mass: Tensor
    missed: float
    passes: int


def _approach(
    model: Any,
    asked: Sequence[tuple[Batch, Tensor, Tensor | None]],
    before: Sequence[AttentionMetrics],
    heads: Mapping[int, tuple[int, ...]],
    target: float,
) -> _Reached:
    """From the closed form on, λ by λ nearer; the best of what was measured."""
    wanted = math.log(target / (1 - target))
    steered = torch.zeros_like(_mean(before, before, "span_mass"), dtype=torch.bool)
    for row, layer in enumerate(sorted(heads)):
        steered[row, list(heads[layer])] = True
    strength = wanted - _mean(before, before, "span_log_odds")
    best = _Reached(strength, strength, math.inf, 0)
    for passes in range(1, max(MOST, len(heads) + 1) + 1):
        with use_strength(model, _named(strength, heads)):
            after = [_measure(model, *each, heads, same_logits=True) for each in asked]
        mass = _mean(after, before, "steered_span_mass")
        missed = float((mass / target - 1).abs()[steered].max())
        if missed < best.missed:
            best = _Reached(strength, mass, missed, passes)
        if missed <= ENOUGH:
            break
        sure = mass.clamp(1e-6, 1 - 1e-6)
        slope = _mean([_spread(part) for part in after], before, "steered_span_mass") / (sure * (1 - sure))
        step = (wanted - torch.logit(sure)) / slope.clamp(0.1, 1.0)
        strength = strength + step.clamp(-_LONGEST_STEP, _LONGEST_STEP)
    return dataclasses.replace(best, passes=passes)


def _spread(part: AttentionMetrics) -> AttentionMetrics:
    """ψ(1-ψ) of each query in place of its steered share."""
    share: Tensor = part.steered_span_mass  # type: ignore[assignment]
    return dataclasses.replace(part, steered_span_mass=share * (1 - share))


def marked_tokens(model: Any, batch: Batch, layer: int) -> Tensor:
    """`(batch, tokens)` bool: what the saliency in force scores at least half as high as any; arguments as for `scores_in_force`.

    Raises:
        SaliencyError: scores below 0 or above 1, or nothing that is scored.
    """
    scores = scores_in_force(model, batch, layer)
    if not scores.any() or not ((scores >= 0) & (scores <= 1)).all():
        raise SaliencyError(
            f"a target mass needs a saliency from 0 to 1, and above 0 on the span; in force are scores from {scores.min():g} to "
            f"{scores.max():g}. Leave SaliencyConfig.normalize at 'auto' and say where the span is, by a box, "
            "Saliency.from_text(...) or Saliency.from_tokens(...) of zeros and ones."
        )
    return covered(scores)


def _check(target_mass: float, attention: AttentionConfig) -> None:
    check_number("target_mass", target_mass)
    if not 0 < target_mass < 1:
        raise ConfigError(f"target_mass must lie in (0, 1); got {target_mass}. No finite strength gives a span all or nothing.")
    if attention.saliency.preserve_mass:
        raise ConfigError(
            "saliency.preserve_mass=True keeps the mass where it is, so no strength brings it elsewhere. Patch with "
            "preserve_mass=False."
        )


def _queries(batches: Sequence[Batch], queries: Tensor | Sequence[Tensor] | None, *, generated: bool) -> list[Tensor | None]:
    if queries is None:
        return [last_queries(batch.inputs) if generated else None for batch in batches]
    given = [queries] if isinstance(queries, Tensor) else list(queries)
    if len(given) != len(batches):
        raise ConfigError(f"queries has {len(given)} tensors for {len(batches)} batches; give one for each.")
    return list(given)


def _measure(
    model: Any, batch: Batch, span: Tensor, queries: Tensor | None, heads: Mapping[int, Any], *, same_logits: bool = False
) -> AttentionMetrics:
    with batch.looking(model):
        return attention_metrics(
            model, batch.inputs, span=span, queries=queries, per_query=True, same_logits=same_logits, layers=heads
        )


def _seeing(part: AttentionMetrics) -> Tensor:
    """`(layers, heads, batch, tokens)` bool: queries that can attend to the span and to something else."""
    return ~torch.isnan(part.span_log_odds)  # type: ignore[arg-type]  # there is a span


def _mean(parts: Sequence[AttentionMetrics], before: Sequence[AttentionMetrics], name: str) -> Tensor:
    """`(layers, heads)`: over the queries that can attend to the span and to something else."""
    seen = [_seeing(part) for part in before]
    total = sum(getattr(part, name).masked_fill(~own, 0).sum((2, 3)) for part, own in zip(parts, seen, strict=True))
    count = sum(own.sum((2, 3)) for own in seen)
    if not torch.as_tensor(count).all():
        raise SaliencyError(
            "in some steered layer no measured query can attend both to the span and to something else, so no strength can move "
            "its attention. Mark other tokens, or other queries."
        )
    return torch.as_tensor(total / count)


def _named(table: Tensor, heads: Mapping[int, tuple[int, ...]]) -> dict[int, dict[int, float]]:
    return {layer: {head: float(table[row, head]) for head in heads[layer]} for row, layer in enumerate(sorted(heads))}
