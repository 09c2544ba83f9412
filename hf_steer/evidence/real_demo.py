"""Does the gaze decide, in a decoder that nobody here trained? SmolLM2 reads four reports and is pointed at one of them."""

from __future__ import annotations

import csv
import io
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from hf_steer.evidence.answering import Answering, Condition, quick_dtype
from hf_steer.evidence.pointing import wilson_interval
from hf_steer.evidence.reports import Report, make_reports

STRENGTHS = (1.0, 2.0, 3.0, 4.0)
POINTED = "pointed-at report"
FOUND = 10
"""Heads that are chosen, by attention."""
PROMPTS, CONTROLS = 48, 7
CHOOSING = 24
"""Prompts that choose heads and strength; they share no word with those that are reported on."""


@dataclass(frozen=True)
class RealRow:
    """One condition, over all its prompts.

    Attributes:
        saliency: what the saliency was on.
        heads: which ones were steered.
        strength: λ.
        right_share: share of answers that name what the pointed-at report says and no other, with its 95 % Wilson interval.
        low: its lower end.
        high: its upper end.
        readable_share: share of answers that name what exactly one of the reports says.
        kl_nats: mean KL(unsteered ‖ steered) of the answer's first token.
        prompts: how many.
    """

    saliency: str
    heads: str
    strength: float
    right_share: float
    low: float
    high: float
    readable_share: float
    kl_nats: float
    prompts: int


@dataclass(frozen=True)
class RealResult:
    """The table, what was chosen on other prompts, and one prompt with its answers."""

    rows: tuple[RealRow, ...]
    best_strength: float
    found: Mapping[int, tuple[int, ...]]
    dtype: str
    prompt: str
    pointed_at: str
    answer_before: str
    answer_after: str

    def to_csv(self) -> str:
        """The table, a header first."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [item.name for item in fields(RealRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()


def run_real(
    folder: str | os.PathLike[str], *, prompts: int = PROMPTS, seed: int = 0, strengths: Sequence[float] = STRENGTHS,
    found: int = FOUND,
) -> RealResult:  # fmt: skip
    """Measure the share of answers that follow the report that is pointed at, beside the controls.

    Heads and strength are chosen on other prompts, which share no sentence, question, word or person with those reported on.

    Args:
        folder: of a text model with a chat template.
        prompts: how many are reported on.
        seed: of prompts, random heads and shuffles.
        strengths: λ to try.
        found: heads to choose.
    """
    choosing, reports = make_reports("choose", min(CHOOSING, prompts), seed=seed), make_reports("report", prompts, seed=seed)
    total = len(choosing) * (1 + len(strengths)) + prompts * (1 + len(strengths) + CONTROLS)
    answering = Answering(folder, quick_dtype())  # which has a progress bar of transformers' own
    with tqdm(total=total, unit="prompt", leave=False) as bar:
        looks = answering.looks(choosing, bar)
        heads = _top(looks, found)
        hits = {}
        for strength in strengths:
            said, _ = answering.answers(Condition(POINTED, "found heads", heads, strength), choosing, bar)
            hits[strength] = _count(choosing, said)
        best = max(strengths, key=lambda value: (hits[value], -value))  # of equals the gentlest
        rivals = _others(heads, (looks.shape[0], looks.shape[1]), random.Random(seed))
        return _report(answering, reports, _conditions(heads, rivals, best, strengths), best, seed, bar)


def _conditions(
    heads: dict[int, tuple[int, ...]], rivals: Mapping[str, dict[int, tuple[int, ...]]], best: float, strengths: Sequence[float]
) -> list[Condition]:
    """The rows of the table after the unsteered one."""
    conditions = [Condition(POINTED, "found heads", heads, value) for value in strengths]
    conditions += [Condition(kind, "found heads", heads, best) for kind in ("another report", "shuffled", "uniform")]
    conditions += [Condition(POINTED, name, own, best) for name, own in rivals.items()]
    return conditions + [Condition(POINTED, "all heads", "all", value) for value in (best / 2, best)]


def _report(
    answering: Answering, reports: Sequence[Report], conditions: Sequence[Condition], best: float, seed: int, bar: tqdm[Any]
) -> RealResult:
    """The table, on prompts that chose nothing."""
    nothing = Condition("nothing", "none", {}, 0.0)
    unsteered, before = answering.answers(nothing, reports, bar)
    rows, after = [_row(nothing, reports, unsteered, before, before)], unsteered
    best_one = next(each for each in conditions if each.strength == best)
    for condition in conditions:
        said, distribution = answering.answers(condition, reports, bar, seed)
        rows.append(_row(condition, reports, said, before, distribution))
        if condition is best_one:
            after = said
    turned = [n for n, report in enumerate(reports) if report.is_right(after[n]) and not report.is_right(unsteered[n])]
    shown = turned[0] if turned else 0
    report = reports[shown]
    assert isinstance(best_one.heads, dict)  # the found ones
    return RealResult(
        tuple(rows), best, best_one.heads, str(answering.model.dtype).removeprefix("torch."), report.text,
        report.spans[report.meant],
        unsteered[shown].strip(), after[shown].strip(),
    )  # fmt: skip


def _row(condition: Condition, reports: Sequence[Report], said: Sequence[str], before: Tensor, after: Tensor) -> RealRow:
    hits, total = _count(reports, said), len(reports)
    named = sum(report.names(answer) is not None for report, answer in zip(reports, said, strict=True))
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    low, high = wilson_interval(hits, total)
    return RealRow(
        condition.saliency, condition.named, condition.strength, hits / total, low, high, named / total, max(kl, 0.0), total
    )


def _count(reports: Sequence[Report], said: Sequence[str]) -> int:
    return sum(report.is_right(answer) for report, answer in zip(reports, said, strict=True))


def _by_layer(heads: Sequence[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(sorted(head for own, head in heads if own == layer)) for layer in sorted({layer for layer, _ in heads})}


def _top(looks: Tensor, found: int) -> dict[int, tuple[int, ...]]:
    """The heads that look at the reports the most."""
    width = looks.shape[1]
    order = looks.flatten().argsort(descending=True)[:found].tolist()
    return _by_layer([divmod(place, width) for place in order])


def _others(
    heads: Mapping[int, tuple[int, ...]], shape: tuple[int, int], drawn: random.Random
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Heads for the controls: as many others of each layer, as far as there are others, and as many from anywhere."""
    depth, width = shape
    left = {layer: [head for head in range(width) if head not in heads.get(layer, ())] for layer in range(depth)}
    alike = {layer: tuple(sorted(drawn.sample(left[layer], min(len(own), len(left[layer]))))) for layer, own in heads.items()}
    everywhere = [(layer, head) for layer, own in left.items() for head in own]
    anywhere = _by_layer(drawn.sample(everywhere, min(sum(map(len, heads.values())), len(everywhere))))
    return {"random, same layers": {layer: own for layer, own in alike.items() if own}, "random, anywhere": anywhere}
