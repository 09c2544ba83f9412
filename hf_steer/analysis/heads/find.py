"""Which heads look where they are told to look, and let the answer follow?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_steer.analysis.heads.batches import batches_of
from hf_steer.analysis.heads.candidates import (
    attending,
    best_candidates,
    count_candidates,
    measuring_saliency,
    measuring_strength,
)
from hf_steer.analysis.heads.examples import HeadExample, Row, resolve_examples
from hf_steer.analysis.heads.origin import origin_of
from hf_steer.analysis.heads.report import make_report
from hf_steer.analysis.heads.result import HeadResult, Table
from hf_steer.analysis.heads.rules import BY_ANSWER, RULES, TRIED, rank
from hf_steer.analysis.heads.scores import attention_scores, look, pointing_hits
from hf_steer.analysis.heads.selection import (
    Attends,
    Head,
    measure,
    refuse_narrow_patch,
    right_answers,
    steerable,
    steering_scores,
)
from hf_steer.analysis.heads.slopes import slopes
from hf_steer.config import SaliencyConfig
from hf_steer.config.checks import check_choice, check_count, check_number
from hf_steer.errors import ConfigError, PatchError
from hf_steer.ground.parts import Anatomy
from hf_steer.patching import get_steer_status

FEWEST = 20
"""Examples to choose with, and to report on: an interval of fewer would say nothing."""


def find_grounding_heads(
    model: Any,
    examples: Sequence[HeadExample],
    *,
    count: int = 4,
    rule: str | None = None,
    strength: float | None = None,
    saliency: SaliencyConfig | None = None,
    attends: Attends = "self",
    report: Sequence[HeadExample] | None = None,
    report_fraction: float = 0.5,
    null_sets: int = 20,
    candidates: int | None = None,
    shortlist: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> HeadResult:
    """Choose heads on one part of the examples, and report on the other whether they are better than chance.

    The attention scores take one pass over the examples for all heads, slopes one forwards and one backwards; `"effect"` takes one
    pass for each of the `candidates`, `"forward"` about `count` times as many, and the report of answers two passes for each random
    set. The model is left as it was.

    Args:
        model: on any device, in evaluation mode. An unpatched one is patched meanwhile; a patched one must reach all layers by the
            user's saliency.
        examples: at least 40, or 20 when `report` is given; all with answers or none.
        count: heads to choose.
        rule: `"forward"`: grow a set by the head that most raises the share of right answers (the default, where there are
            answers and all heads are candidates). `"effect"`: by the change of log p(answer) when the head alone is steered (the
            default with answers otherwise). `"slope"`: by how log p(answer) begins to change with the head's λ. `"mass"`: by
            attention to the picture, or to all that the span is compared with. `"localisation"`: compact attention among heads of
            much mass (arXiv 2503.06287). `"pointing"`: by how often the most attended token is in the span. `"selectivity"`: by
            the span's attention over its equal share (the default without answers).
        strength: λ while measuring; with the default saliency it multiplies the odds of a token of the span against one outside
            by e^λ. None: 32 where pictures keep their mass, so that a steered head sees the span alone in them; else 4, which
            turns a head and leaves what the model writes readable.
        saliency: scaling while measuring, with `source=None`; of an unpatched model. By default the scores as they are, 1 in the
            span and 0 outside, and pictures keep their mass.
        attends: `"self"`, or `"cross"`: the heads that look at what an encoder hands on (Whisper).
        report: examples to report on; a random part of `examples` when None.
        report_fraction: that part, above 0 and below 1.
        null_sets: random sets of heads of each kind (same layers, anywhere).
        candidates: how many heads are steered one by one, those of the steepest slope; None for all in a model of at most 64
            heads, else for 24, or three for each that is to be chosen. The others get no effect.
        shortlist: forward selection tries only this many heads, those that are best alone, after its first round; all when None.
        batch_size: examples that go through the model together. Prompts of text are padded; others as far as lengths are equal.
        seed: of the split, the random sets and the intervals.

    Raises:
        ConfigError: too few examples, one that does not fit the model, a rule without its answers, more heads than there are.
        SaliencyError: a span that is empty, outside of what it is compared with, or all of it.
        PatchError: unknown family; patched so that not all heads can be reached; in training mode.
    """
    anatomy = attending(model, attends)
    shape = _shape_of(anatomy)
    tried = count_candidates(shape, count) if candidates is None else candidates
    shortlist = tried if shortlist is None else shortlist
    _check_numbers(count, shape, strength, null_sets, tried, shortlist, batch_size)
    own_saliency = _check_model(model, saliency)
    choosing, reporting = _split(examples, report, report_fraction, seed, anatomy)
    saliency = own_saliency or measuring_saliency([*choosing, *reporting])
    strength = measuring_strength(saliency, [*choosing, *reporting]) if strength is None else strength
    answered = _all_answered([*choosing, *reporting])
    rule = _rule(rule, answered, all_tried=tried == shape[0] * shape[1])
    choose, tell = batches_of(choosing, batch_size), batches_of(reporting, batch_size)
    scores = attention_scores(look(model, choose, "attention", sites=anatomy.layers))
    forward: tuple[Head, ...] = ()
    if rule == "localisation" and rule not in scores:
        raise ConfigError(f"the token grid of {anatomy.family!r} is not known, so its attention has no spatial entropy.")
    with steerable(model, saliency, attends) if answered else nullcontext():
        if rule == "slope" or (rule in BY_ANSWER and tried < shape[0] * shape[1]):
            scores["slope"] = slopes(model, choose)
        if rule in TRIED:
            own, forward = steering_scores(
                partial(measure, model, choose, strength), shape, best_candidates(scores, tried), forward=rule == "forward",
                count=count, shortlist=shortlist,
            )  # fmt: skip
            scores |= own
        rankings = rank(scores) | ({"forward": forward} if forward else {})
        judge = partial(make_report, chosen=rankings[rule][:count], shape=shape, null_sets=null_sets, seed=seed)
        if answered:
            answers = partial(measure, model, tell, strength)
            outcome = judge("answers", partial(right_answers, answers), answers([]).right)
        else:
            chance = torch.stack([row.target.double().mean() for row in reporting])
            outcome = judge("pointing", partial(pointing_hits, model, tell, anatomy.layers), chance)
    tables = {name: _table(score) for name, score in scores.items()}
    named = {rule: tuple((anatomy.layers[place].index, head) for place, head in heads) for rule, heads in rankings.items()}
    origin = origin_of(anatomy, [*choosing, *reporting], saliency, seed=seed)
    return HeadResult(rule, named[rule][:count], tables, named, outcome, float(strength), len(choosing), origin)


def _rule(rule: str | None, answered: bool, *, all_tried: bool) -> str:
    """The rule that was asked for, or the one that suits the examples and the number of heads."""
    if rule is None:
        return "selectivity" if not answered else "forward" if all_tried else "effect"
    check_choice("rule", rule, RULES)
    if rule in BY_ANSWER and not answered:
        raise ConfigError(f"rule {rule!r} needs examples with answers; these have none. Use 'pointing' or 'selectivity'.")
    return rule


def _shape_of(anatomy: Anatomy) -> tuple[int, int]:
    """Layers that attend, and heads in each; ConfigError where they have different numbers of heads."""
    counts = sorted({site.heads for site in anatomy.layers})
    if len(counts) > 1:
        raise ConfigError(
            f"the layers of this {anatomy.family!r} have {' or '.join(map(str, counts))} heads, and heads are compared across "
            "layers of as many. Name heads yourself: AttentionConfig(heads={layer: heads})."
        )
    return len(anatomy.layers), anatomy.num_heads


def _check_numbers(
    count: int, shape: tuple[int, int], strength: float | None, null_sets: int, tried: int, shortlist: int, batch_size: int
) -> None:
    given = {"count": count, "null_sets": null_sets, "candidates": tried, "shortlist": shortlist, "batch_size": batch_size}
    for name, value in given.items():
        check_count(name, value)
    if strength is not None:
        check_number("strength", strength)
    if strength == 0:
        raise ConfigError("strength must not be 0: it would steer nothing.")
    heads = shape[0] * shape[1]
    if count > heads or min(tried, shortlist) < count:
        limit = f"the model has {heads}, {shape[1]} in each of {shape[0]} layers"
        if count <= heads:
            limit = f"candidates={tried}" if tried < count else f"shortlist={shortlist}"
        raise ConfigError(f"count={count} is more heads than there are to choose from: {limit}.")


def _check_model(model: Any, saliency: SaliencyConfig | None) -> SaliencyConfig | None:
    """The scaling that was asked for, or that a patched model has."""
    refuse_narrow_patch(model)
    if model.training:
        raise PatchError("the model is in training mode, where dropout makes every measurement another; call model.eval() first.")
    if saliency is not None and (get_steer_status(model).patched or saliency.source is not None):
        raise ConfigError("saliency is for models that are not patched yet, with source=None; a patched one keeps its own.")
    config = get_steer_status(model).config
    return saliency if config is None or config.attention is None else config.attention.saliency


def _split(
    examples: Sequence[HeadExample], report: Sequence[HeadExample] | None, fraction: float, seed: int, anatomy: Anatomy
) -> tuple[list[Row], list[Row]]:
    """Examples to choose with, and others to report on."""
    examples = list(examples)
    if not examples:
        raise ConfigError("there are no examples; give HeadExample objects.")
    if report is None:
        check_number("report_fraction", fraction)
        if not 0 < fraction < 1:
            raise ConfigError(f"report_fraction must lie between 0 and 1; got {fraction}.")
        rows = resolve_examples(examples, anatomy)
        order = np.random.default_rng(seed).permutation(len(rows))
        kept = len(rows) - round(len(rows) * fraction)
        choosing, reporting = [rows[number] for number in order[:kept]], [rows[number] for number in order[kept:]]
    else:
        if {id(example) for example in examples} & {id(example) for example in report}:
            raise ConfigError("some examples are in both examples and report; heads must be reported on others than chose them.")
        choosing, reporting = resolve_examples(examples, anatomy), resolve_examples(list(report), anatomy)
    if min(len(choosing), len(reporting)) < FEWEST:
        raise ConfigError(
            f"too few examples: {len(choosing)} to choose with, {len(reporting)} to report on; it takes at least {FEWEST} of each. "
            f"Of {FEWEST} answers a share is known to about a fifth, of 100 to a tenth."
        )
    return choosing, reporting


def _all_answered(rows: Sequence[Row]) -> bool:
    given = sum(row.answer is not None for row in rows)
    if given not in (0, len(rows)):
        raise ConfigError(f"{given} of {len(rows)} examples have an answer; give all of them one, or none.")
    return given > 0


def _table(scores: Tensor) -> Table:
    return tuple(tuple(None if value != value else value for value in row) for row in scores.tolist())
