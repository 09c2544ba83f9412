"""What steering does to the answer, for any set of heads, without patching again; and sets grown by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_steer.analysis.heads.batches import Batch, logits_after_query
from hf_steer.config import AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.errors import PatchError
from hf_steer.patching import anatomy_of, disable_steering, get_steer_status, patch_model, unpatch_model, use_saliency, use_strength

Head = tuple[int, int]
"""Layer and query head. While heads are compared, layers count by their place among those that attend; results name them."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What the model answers.

    Attributes:
        right: `(examples,)` float64, 1 where the most probable token is the answer.
        log_p: `(examples,)` float64, log-probability of the answer in nats.
    """

    right: Tensor
    log_p: Tensor

    @property
    def merit(self) -> tuple[float, float]:
        """Share of right answers; ties go by the mean log-probability."""
        return float(self.right.mean()), float(self.log_p.mean())


Measure = Callable[[Iterable[Head]], Answers]
Attends = Literal["self", "cross"]


def by_layer(heads: Iterable[Head]) -> dict[int, tuple[int, ...]]:
    """As `AttentionConfig(heads=...)` takes them."""
    found: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        found.setdefault(layer, []).append(head)
    return {layer: tuple(own) for layer, own in found.items()}


@contextmanager
def steerable(model: Any, saliency: SaliencyConfig, attends: Attends) -> Iterator[None]:
    """All heads of all layers within reach of `use_strength`: patched for the duration, unless the caller has patched so.

    Raises:
        PatchError: patched so that not all layers are steered, or by the model's own eyes.
    """
    if get_steer_status(model).patched:
        refuse_narrow_patch(model)
        yield
        return
    attention = AttentionConfig(heads="all", strength=1.0, saliency=saliency, attends=attends, queries="all")
    patch_model(model, SteerConfig(attention=attention))
    try:
        yield
    finally:
        unpatch_model(model)


def refuse_narrow_patch(model: Any) -> None:
    """PatchError for a patched model whose heads cannot all be reached always, or that looks where its own eyes look."""
    status = get_steer_status(model)
    if not status.patched:
        return
    attention = None if status.config is None else status.config.attention
    layers = len(anatomy_of(model).layers)
    reached = attention is not None and attention.saliency.source is None and len(status.heads or ()) == layers
    if attention is None or not reached or attention.gate is not None or attention.phases("tokens") != (1.0, 1.0, 1.0):
        raise PatchError(
            f"this model is patched, but not so that all its {layers} layers are always steered towards given spans. Unpatch it, "
            "which leaves the patching to this call, or patch it with AttentionConfig(heads=\"all\", "
            "saliency=SaliencyConfig(source=None)), without gate or schedule and with queries=\"all\"."
        )


@torch.no_grad()
def measure(model: Any, batches: Sequence[Batch], strength: float, heads: Iterable[Head]) -> Answers:
    """Steer these heads, and no others, towards each example's span.

    Args:
        model: patched as `steerable` leaves it.
        batches: examples with answers.
        strength: λ.
        heads: none for the model as it is.
    """
    sites = anatomy_of(model).layers
    chosen = {sites[place].index: dict.fromkeys(own, strength) for place, own in by_layer(heads).items()}
    right = torch.zeros(sum(len(batch.numbers) for batch in batches), dtype=torch.float64)
    log_p = torch.zeros_like(right)
    for batch in batches:
        if chosen:
            with use_saliency(model, batch.statement), use_strength(model, chosen):
                logits = logits_after_query(model, batch)
        else:
            with disable_steering(model):
                logits = logits_after_query(model, batch)
        logits = logits.cpu().double()
        numbers, answers = torch.tensor(batch.numbers), torch.tensor([row.answer for row in batch.rows])
        right[numbers] = (logits.argmax(-1) == answers).double()
        log_p[numbers] = torch.log_softmax(logits, -1).gather(1, answers[:, None])[:, 0]
    return Answers(right, log_p)


def single_effects(measure: Measure, heads: Sequence[Head]) -> dict[Head, Answers]:
    """Each head by itself."""
    return {head: measure([head]) for head in tqdm(heads, desc=f"{'each head alone':<24}", unit="head", leave=False)}


def grow(
    measure: Measure, singles: Mapping[Head, Answers], *, count: int, shortlist: int
) -> tuple[list[Head], dict[Head, Answers]]:
    """Forward selection: again and again the head that most raises the share of right answers.

    Args:
        measure: answers under a set of heads.
        singles: answers under each head alone, the first round.
        count: heads to choose, at most `shortlist`.
        shortlist: how many heads, best alone, are tried in the other rounds.

    Returns:
        The heads in the order of their choice; and, for each head of the short list, the answers of the set with it in the
        round in which it was chosen, or in the last round.
    """
    candidates = sorted(singles, key=lambda head: singles[head].merit, reverse=True)[:shortlist]
    chosen, reached = [candidates[0]], {head: singles[head] for head in candidates}
    while len(chosen) < count:
        rest = [head for head in candidates if head not in chosen]
        title = f"head {len(chosen) + 1} of {count}"
        for head in tqdm(rest, desc=f"{title:<24}", unit="head", leave=False):
            reached[head] = measure([*chosen, head])
        chosen.append(max(rest, key=lambda head: reached[head].merit))
    return chosen, reached


def steering_scores(
    measure: Measure, shape: tuple[int, int], candidates: Sequence[Head], *, forward: bool, count: int, shortlist: int
) -> tuple[dict[str, Tensor], tuple[Head, ...]]:
    """The scores that take steering, and all heads as forward selection ranks them (none without it).

    Args:
        measure: answers under a set of heads.
        shape: layers and heads of the model.
        candidates: the heads that are steered.
        forward: whether to select.
        count: heads to choose.
        shortlist: see `grow`.

    Returns:
        `effect` and, with forward selection, `forward`, `(layers, heads)` float64: see `HeadResult`. NaN where not tried.
    """
    every = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
    plain = measure([])
    singles = single_effects(measure, sorted(candidates))
    gains = {head: float((own.log_p - plain.log_p).mean()) for head, own in singles.items()}
    scores = {"effect": _on_heads(gains, shape)}
    if not forward:
        return scores, ()
    chosen, reached = grow(measure, singles, count=count, shortlist=shortlist)
    scores["forward"] = _on_heads({head: float(own.right.mean()) for head, own in reached.items()}, shape)
    tried = sorted(set(reached) - set(chosen), key=lambda head: reached[head].merit, reverse=True)
    return scores, (*chosen, *tried, *(head for head in every if head not in reached))


def _on_heads(values: Mapping[Head, float], shape: tuple[int, int]) -> Tensor:
    """`(layers, heads)` float64, NaN where there is no value."""
    table = torch.full(shape, float("nan"), dtype=torch.float64)
    for place, value in values.items():
        table[place] = value
    return table


def right_answers(measure: Measure, sets: Sequence[Sequence[Head]]) -> Tensor:
    """`(sets, examples)`: 1 where the answer is right while the set is steered."""
    return torch.stack([measure(heads).right for heads in tqdm(sets, desc=f"{'report':<24}", unit="set", leave=False)])
