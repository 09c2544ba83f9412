"""The largest strength that keeps a budget of divergence on the user's own prompts, by measurement."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from hf_steer.analysis.bracketing import Found, search
from hf_steer.analysis.prompts import Inputs, as_batches, steered_heads
from hf_steer.analysis.provenance import Provenance, provenance_of
from hf_steer.analysis.retention import continue_unsteered
from hf_steer.analysis.said_again import said_again
from hf_steer.analysis.tables import as_text
from hf_steer.config import AttentionConfig
from hf_steer.config.checks import Strength, check_number, check_strength
from hf_steer.errors import ConfigError
from hf_steer.patching import use_strength
from hf_steer.patching.scopes import steering_of
from hf_steer.saliency import Saliency

MOST = 16
"""Measurements of one search."""
_ALONE = 6
"""Measurements of each head alone; what they leave open, the common factor settles."""
_ALONE_TOLERANCE = 0.1


@dataclass(frozen=True)
class Evaluation:
    """One measurement: a strength as `use_strength` takes it, and the mean KL(unsteered ‖ steered) of the next token with it."""

    strength: Strength
    kl_nats: float


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_strength` found.

    Attributes:
        strength: λ of the steered heads, or `{layer: {head: λ}}`; it was itself measured to keep the budget. 0 when no
            strength that was tried does.
        kl_nats: what was measured with it.
        budget_nats: what was asked for.
        largest_kept: the search ended at `largest` (per head: where one of them reaches it), which keeps the budget.
        monotone: the divergences of the (last) search grew with the strength. If not, a strength above the one that was found
            may keep the budget, too.
        evaluations: all that was measured, in this order.
        attention: the model's AttentionConfig with this strength, ready to be patched in.
        provenance: where these numbers come from.
    """

    strength: Strength
    kl_nats: float
    budget_nats: float
    largest_kept: bool
    monotone: bool
    evaluations: tuple[Evaluation, ...]
    attention: AttentionConfig
    provenance: Provenance

    def to_json(self) -> str:
        """Everything but `attention`, layers and heads as strings; `heads` are those that `strength` is for."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "attention"}
        values["heads"] = self.attention.heads
        values["provenance"] = dataclasses.asdict(self.provenance)
        values["evaluations"] = [{"strength": one.strength, "kl_nats": one.kl_nats} for one in self.evaluations]
        return json.dumps(values, indent=2, default=dict) + "\n"

    def __repr__(self) -> str:
        per_head = "" if isinstance(self.strength, float) else " at most"
        return (
            f"<Calibration: λ = {largest_of(self.strength):.4g}{per_head} keeps {self.kl_nats:.3g} of {self.budget_nats:g} nats "
            f"per token; {len(self.evaluations)} measured{'' if self.monotone else ', not monotone'}>"
        )

    def __str__(self) -> str:
        notes = f"{len(self.evaluations)} measured."
        if self.largest_kept:
            notes += " The search ended at the largest strength that was allowed; more may keep it, too."
        if not self.monotone:
            notes += " Divergence did not grow steadily with strength: a larger one may keep the budget, too."
        if isinstance(self.strength, float):
            head = f"λ = {self.strength:.4g} keeps the budget:"
            curve = sorted((largest_of(one.strength), one.kl_nats) for one in self.evaluations)
            rows: list[dict[str, Any]] = [{"λ": strength, "KL (nats)": kl} for strength, kl in curve]
        else:
            head = "These strengths keep the budget together:"
            rows = rows_per_head(self.strength, {})
        return f"{head} KL {self.kl_nats:.4g} of {self.budget_nats:.4g} nats per token, {notes}\n\n{as_text(rows)}"


def calibrate_strength(
    model: Any,
    inputs: Inputs | Sequence[tuple[Inputs, Saliency | None]],
    budget_nats: float,
    *,
    saliency: Saliency | None = None,
    per_head: bool = False,
    new_tokens: int = 32,
    largest: float = 64.0,
    tolerance: float = 0.02,
    generate_kwargs: Mapping[str, Any] | None = None,
) -> Calibration:
    """Find the largest strength whose mean KL(unsteered ‖ steered) of the next token keeps a budget; see `measure_retention`.

    The budget is bracketed, beginning at 1, and approached along the line through what was measured; about six measurements, at
    most 16. Where steering reaches all queries, without a gate, each is one pass over prompt and continuation, whose distributions
    are those of `generate` but for rounding; elsewhere it is a `generate` that is made to say the continuation. Divergence need
    not grow with strength: what is found lies just below a strength that exceeds the budget, and larger ones that keep it again are
    not looked for.

    Per head, each steered head is first calibrated alone to an equal part of the budget, roughly, then all are scaled by one common
    factor until together they keep the whole: parts do not add up to what heads do together. That takes about four measurements
    more for each head.

    Args:
        model: patched, in eval mode.
        inputs: of `generate`, padded on the left; or a list of pairs (inputs, Saliency or None).
        budget_nats: mean KL per token to keep, above 0.
        saliency: what is said about a single batch; None for what is in force already, or for the model's own eyes.
        per_head: a strength for each steered head instead of one for all.
        new_tokens: how far to follow the continuations, at most.
        largest: strength that is not exceeded, above 0.
        tolerance: the found strength may lie below the next measured one by this share of it, in (0, 1).
        generate_kwargs: further arguments of `generate`.

    Raises:
        ConfigError: a budget, largest strength or tolerance out of range, or no prompts.
        PatchError: the model is not patched, or its configuration steers no head.
    """
    heads = steered_heads(model)
    _check(budget_nats, largest, tolerance)
    batches = as_batches(inputs, saliency)
    origin = provenance_of(model, batches, seed=0, new_tokens=new_tokens, generate_kwargs=dict(generate_kwargs or {}))
    said = continue_unsteered(model, batches, new_tokens, generate_kwargs)
    diverge = said_again(model, batches, said, generate_kwargs, noise_nats=budget_nats / 50)
    evaluations: list[Evaluation] = []
    strength: Strength
    with tqdm(desc="strengths", unit="strength", leave=False) as bar:

        def measure(strength: Strength) -> float:
            with use_strength(model, strength):
                kl = diverge().kl_nats
            evaluations.append(Evaluation(check_strength(strength), kl))
            bar.update()
            return kl

        limits = {"largest": largest, "tolerance": tolerance}
        if per_head:
            strength, found = _per_head(measure, heads, budget_nats, **limits)
        else:
            found = search(measure, budget_nats, **limits, most=MOST)
            strength = found.value
    return Calibration(
        strength=check_strength(strength),
        kl_nats=found.kl_nats,
        budget_nats=float(budget_nats),
        largest_kept=found.largest_kept,
        monotone=found.monotone,
        evaluations=tuple(evaluations),
        attention=attention_with(model, strength),
        provenance=origin,
    )


def largest_of(strength: Strength) -> float:
    """The largest of all λ."""
    return max(map(largest_of, strength.values())) if isinstance(strength, Mapping) else float(strength)


def rows_per_head(strength: Mapping[int, Any], columns: Mapping[str, Mapping[int, Mapping[int, float]]]) -> list[dict[str, Any]]:
    """A row for each head: layer, head, λ, and what else is known of it."""
    return [
        {"layer": layer, "head": head, "λ": value, **{name: table[layer][head] for name, table in columns.items()}}
        for layer, own in strength.items()
        for head, value in own.items()
    ]


def attention_with(model: Any, strength: Strength) -> AttentionConfig:
    """A patched model's AttentionConfig with its steered heads named and another strength."""
    attention: AttentionConfig = steering_of(model).plan.config.attention
    return dataclasses.replace(attention, heads=steered_heads(model), strength=strength)


def _check(budget_nats: float, largest: float, tolerance: float) -> None:
    for name, value in (("budget_nats", budget_nats), ("largest", largest), ("tolerance", tolerance)):
        check_number(name, value)
        if value <= 0 or (name == "tolerance" and value >= 1):
            allowed = "in (0, 1)" if name == "tolerance" else "above 0"
            raise ConfigError(f"{name} must be {allowed}; got {value}.")


def _per_head(
    measure: Callable[[Strength], float],
    heads: Mapping[int, tuple[int, ...]],
    budget_nats: float,
    *,
    largest: float,
    tolerance: float,
) -> tuple[Strength, Found]:
    """Each head alone to its part of the budget, then all by one factor to the whole; none comes above `largest`."""
    alone = _each_alone(measure, heads, budget_nats, largest=largest, tolerance=tolerance)
    top = max(value for own in alone.values() for value in own.values())
    bound = largest / top if top else 1.0
    found = search(lambda factor: measure(_scaled(alone, factor)), budget_nats, largest=bound, tolerance=tolerance, most=MOST)
    return _scaled(alone, found.value), dataclasses.replace(found, largest_kept=found.largest_kept and top > 0)


def _each_alone(
    measure: Callable[[Strength], float],
    heads: Mapping[int, tuple[int, ...]],
    budget_nats: float,
    *,
    largest: float,
    tolerance: float,
) -> dict[int, dict[int, float]]:
    """The strength of each head that, alone, keeps an equal part of the budget."""
    part = budget_nats / sum(map(len, heads.values()))
    alone: dict[int, dict[int, float]] = {}
    for layer, own in heads.items():
        for head in own:
            found = search(
                partial(_of_head, measure, layer, head), part, largest=largest, tolerance=max(tolerance, _ALONE_TOLERANCE),
                most=_ALONE,
            )  # fmt: skip
            alone.setdefault(layer, {})[head] = found.value
    return alone


def _of_head(measure: Callable[[Strength], float], layer: int, head: int, value: float) -> float:
    return measure({layer: {head: value}})


def _scaled(strength: Mapping[int, Mapping[int, float]], factor: float) -> dict[int, dict[int, float]]:
    return {layer: {head: factor * value for head, value in own.items()} for layer, own in strength.items()}
