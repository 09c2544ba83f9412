"""What each strength does: to attention, to the answers, to the model's own words, and to a task."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from hf_steer.analysis.metrics import attention_metrics
from hf_steer.analysis.metrics_table import AttentionMetrics, pool
from hf_steer.analysis.pointed import pointed_at
from hf_steer.analysis.prompts import Batch, Inputs, Span, as_batches, last_queries, steered_heads
from hf_steer.analysis.provenance import Provenance, provenance_of
from hf_steer.analysis.retention import Continuation, continue_greedily, continue_unsteered, divergence
from hf_steer.analysis.sweep_table import Sweep, SweepRow, read_finished
from hf_steer.config.checks import check_number
from hf_steer.errors import ConfigError
from hf_steer.files import write_whole
from hf_steer.patching import get_steer_status, use_strength
from hf_steer.saliency import Saliency

Task = Callable[[list[Any], int], Sequence[float]]
SAID = "said"
"""The span that is what is said."""
RESAMPLES = 2000
"""Of the rows, for an interval."""


def sweep_strength(
    model: Any,
    inputs: Inputs | Sequence[tuple[Inputs, Saliency | None]],
    strengths: Sequence[float],
    *,
    saliency: Saliency | None = None,
    span: Span | Sequence[Tensor] = SAID,
    task: Task | None = None,
    decode: Callable[[list[list[int]]], list[str]] | None = None,
    new_tokens: int = 32,
    path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    generate_kwargs: Mapping[str, Any] | None = None,
) -> Sweep:
    """Measure a patched model at several strengths of its steered heads; nothing is patched again.

    Unless `queries="all"`, attention is measured where a prompt is steered: in its last token.

    Args:
        model: patched, in eval mode; the heads that its configuration steers are swept together.
        inputs: of `generate`, padded on the left; or a list of pairs (inputs, Saliency or None).
        strengths: λ to measure.
        saliency: what is said about a single batch; None for what is in force already, or for the model's own eyes.
        span: tokens whose share of attention is measured: `"said"`, those that what is said scores at least half as high as any
            (where nothing is said the pictures or sounds, or nothing in a text); or as for `attention_metrics`; or a list of bool
            tensors, one per batch.
        task: called as `task(answers, batch_index)` for each batch, returns a score per row. The answers are texts with
            `decode`, else lists of token ids.
        decode: from lists of token ids to texts, such as `processor.batch_decode`.
        new_tokens: length of the continuations, at most.
        path: CSV to which each finished strength is written. What it holds already is not measured again, if it was measured
            with the same configuration on the same inputs.
        seed: of the bootstrap.
        generate_kwargs: further arguments of `generate`.

    Raises:
        ConfigError: no strengths, one that is not a number, no prompts, or a task that does not score each row.
        PatchError: the model is not patched, or its configuration steers no head.
        SaliencyError: nothing of the span in the prompts, or a saliency that does not fit them.
        FileError: `path` holds another sweep, or something else.
    """
    heads = steered_heads(model)
    strengths = _checked(strengths)
    batches = as_batches(inputs, saliency)
    spans = _per_batch(span, len(batches))
    if span == SAID:
        spans = [pointed_at(model, batch, min(heads)) for batch in batches]
    settings = {"span": span, "new_tokens": new_tokens, "generate_kwargs": dict(generate_kwargs or {})}
    origin = provenance_of(model, batches, seed=seed, **settings)
    done = {} if path is None else read_finished(Path(path), origin, scored=task is not None)
    todo = [value for value in strengths if value not in done]
    if todo:
        said = continue_unsteered(model, batches, new_tokens, generate_kwargs)
    with tqdm(total=len(todo) * len(batches), desc="strengths", unit="batch", leave=False, disable=not todo) as bar:
        for value in todo:
            with use_strength(model, value):
                attention = _attention(model, batches, spans)
                answers = []
                for batch in batches:
                    answers.append(continue_greedily(model, batch, new_tokens, generate_kwargs))
                    bar.update()
                kl = divergence(model, batches, said, generate_kwargs).kl_nats
            texts = _texts(answers, decode)
            scores = None if task is None else _scores(task, decode, answers)
            done[value] = _row(value, attention, heads, said, answers, kl, scores, texts, origin)
            if path is not None:
                write_whole(Path(path), Sweep(tuple(done.values())).to_csv().encode())
    return Sweep(tuple(done[value] for value in strengths))


def bootstrap_interval(scores: Sequence[float], *, seed: int) -> tuple[float, float]:
    """95 % percentile interval of a mean, over resampled rows; of equal scores it has no width, however few they are."""
    drawn = np.random.default_rng(seed).choice(np.asarray(scores, dtype=np.float64), (RESAMPLES, len(scores))).mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def _checked(strengths: Sequence[float]) -> tuple[float, ...]:
    values = tuple(strengths)
    if not values:
        raise ConfigError("there is no strength to measure; give at least one, such as strengths=(0, 1, 2, 4).")
    for value in values:
        check_number("a strength of a sweep", value)
    return tuple(dict.fromkeys(float(value) for value in values))


def _per_batch(span: Span | Sequence[Tensor], batches: int) -> list[Span]:
    if span is None or isinstance(span, (str, Tensor)):
        return [span] * batches
    if len(span) != batches:
        raise ConfigError(f"span has {len(span)} tensors for {batches} batches; give one for each.")
    return list(span)


def _attention(model: Any, batches: Sequence[Batch], spans: Sequence[Span]) -> AttentionMetrics:
    config = get_steer_status(model).config
    generated = config is not None and config.attention is not None and config.attention.queries != "all"
    parts = []
    for batch, span in zip(batches, spans, strict=True):
        with batch.looking(model):
            queries = last_queries(batch.inputs) if generated else None
            parts.append(attention_metrics(model, batch.inputs, span=span, queries=queries))
    return pool(parts)


def _over_heads(attention: AttentionMetrics, heads: Mapping[int, tuple[int, ...]]) -> dict[str, Any]:
    """Means over the steered heads, by the row's names."""
    chosen = [(layer, head) for layer, own in heads.items() for head in own]
    tables = {
        "entropy_reduction_percent": attention.entropy_reduction_percent,
        "attention_kl_nats": attention.kl_nats,
        "unsteered_span_mass": attention.span_mass,
        "span_mass": attention.steered_span_mass,
    }
    return {
        name: None if table is None else sum(float(table[place]) for place in chosen) / len(chosen)
        for name, table in tables.items()
    }


def _scores(
    task: Task, decode: Callable[[list[list[int]]], list[str]] | None, answers: Sequence[Continuation]
) -> list[float]:
    scores: list[float] = []
    for index, answer in enumerate(answers):
        tokens = answer.rows()
        own = [float(score) for score in task(tokens if decode is None else decode(tokens), index)]
        if len(own) != len(tokens):
            raise ConfigError(f"the task gave {len(own)} scores for batch {index}, which has {len(tokens)} rows; give one per row.")
        scores += own
    return scores


def _texts(answers: Sequence[Continuation], decode: Callable[[list[list[int]]], list[str]] | None) -> tuple[str, ...]:
    """What each prompt is answered, in words where they can be had."""
    rows = [answer.rows() for answer in answers]
    if decode is None:
        return tuple(" ".join(map(str, row)) for own in rows for row in own)
    return tuple(text for own in rows for text in decode(own))


def changed_share(before: Sequence[int], after: Sequence[int]) -> float:
    """Share of the positions of the longer one whose tokens differ."""
    same = sum(one == other for one, other in zip(before, after, strict=False))
    return 1 - same / max(len(before), len(after))


def _row(
    strength: float,
    attention: AttentionMetrics,
    heads: Mapping[int, tuple[int, ...]],
    said: Sequence[Continuation],
    answers: Sequence[Continuation],
    kl_nats: float,
    scores: Sequence[float] | None,
    texts: tuple[str, ...],
    origin: Provenance,
) -> SweepRow:
    pairs = [
        pair for one, other in zip(said, answers, strict=True) for pair in zip(one.rows(), other.rows(), strict=True)
    ]
    changed = [changed_share(before, after) for before, after in pairs]
    low, high = (None, None) if scores is None else bootstrap_interval(scores, seed=origin.seed)
    return SweepRow(
        strength=strength,
        **_over_heads(attention, heads),
        answers_changed_share=sum(share > 0 for share in changed) / len(changed),
        tokens_changed_share=sum(changed) / len(changed),
        kl_nats=kl_nats,
        task_score=None if scores is None else sum(scores) / len(scores),
        task_low=low,
        task_high=high,
        prompts=len(pairs),
        answers=texts,
        provenance=origin,
    )
