"""How focused attention is, where it goes, and how far steering moves it: per layer and head, on the user's own prompts.

Attention is recomputed from each layer's queries and keys in chunks of queries, in float32; queries × keys weights of all heads
never exist at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_steer.analysis.distributions import kl_nats, probabilities
from hf_steer.analysis.metrics_table import OVER_SPAN, AttentionMetrics, entropy_reduction
from hf_steer.analysis.prompts import Inputs, Span, queries_of, span_of
from hf_steer.attention import AttentionCall, logits_in_chunks
from hf_steer.errors import PatchError, SaliencyError
from hf_steer.ground.arguments import Given, spelling_in, with_changes
from hf_steer.ground.parts import Anatomy
from hf_steer.patching import anatomy_of, disable_steering, get_steer_status, probe_attention

_MASKED = torch.finfo(torch.float32).min / 2
"""Log-probabilities below it belong to keys that may not be attended to."""
_TINY = torch.finfo(torch.float32).tiny

Columns = dict[str, Tensor]
"""Name -> `(batch, heads, queries)` of one layer."""


def attention_metrics(
    model: Any,
    inputs: Inputs,
    *,
    span: Span = "image",
    queries: Tensor | None = None,
    per_query: bool = False,
    same_logits: bool = False,
    layers: Iterable[int] | None = None,
) -> AttentionMetrics:
    """Measure the attention of decoder layers on a prompt, unsteered and steered.

    Unsteered is a pass inside `disable_steering`; steered is a pass with all that is in force where this is called, such as
    `use_saliency` and `use_strength`. A steered layer changes what later layers compute, so that their attention differs, too.

    Args:
        model: a transformers model in eval mode, patched or not.
        inputs: of a forward pass, padded on either side. Of several pictures all tokens together are the span.
        span: tokens whose share is measured: `"image"`, `"video"` or `"audio"`, a bool tensor `(batch, tokens)`, or None.
        queries: `(batch, tokens)` bool: which to take the means over; all real tokens when None.
        per_query: keep each query's own values.
        same_logits: compare the steered pass with itself without its bias, so that what earlier layers changed does not count:
            `KL(A ‖ A') = log E_A[e^b] - E_A[b]`, layer by layer.
        layers: decoder layers; all when None.

    Raises:
        SaliencyError: no token of the span in the prompt, none that a measured query can see, or no query to measure.
        PatchError: unknown family, a layer that is not there, or an attention implementation that cannot be looked at.
    """
    anatomy = anatomy_of(model)
    chosen = _layers(layers, anatomy)
    counted, marked = queries_of(inputs, queries), span_of(anatomy, inputs, span)
    some = counted.any(0).nonzero()
    asked = slice(int(some[0]), int(some[-1]) + 1)
    patched = get_steer_status(model).patched
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    found: dict[int, Columns] = {}

    def keep(call: AttentionCall) -> None:
        kept[call.layer] = call.query.cpu(), call.key.cpu()

    def read(call: AttentionCall) -> None:
        before = dataclasses.replace(call, bias=None)
        if call.layer in kept:
            query, key = (part.to(call.query.device) for part in kept[call.layer])
            before = dataclasses.replace(before, query=query, key=key)
        found[call.layer] = _measure_layer(before, call if patched else None, asked, marked)

    if patched and not same_logits:
        with disable_steering(model):
            run_with(model, inputs, keep, chosen)
    run_with(model, inputs, read, chosen)
    tables = {name: torch.stack([found[layer][name] for layer in chosen]).transpose(1, 2) for name in found[chosen[0]]}
    return _summary(chosen, tables, counted, asked, per_query=per_query)


@torch.no_grad()
def run_with(model: Any, inputs: Inputs, read: Callable[[AttentionCall], None], layers: Iterable[int]) -> None:
    """One forward pass without a cache, and without the logits that nobody reads, under a probe."""
    given, root = Given(inputs), anatomy_of(model).root
    lean: dict[str, Any] = {"keeps_cache": False}
    if given.labels is None and spelling_in(root, "logits_kept") is not None:
        lean["logits_kept"] = 1
    with probe_attention(model, read, layers=layers):
        model(**with_changes(root, given, **lean))


def _layers(layers: Iterable[int] | None, anatomy: Anatomy) -> tuple[int, ...]:
    heads = {site.index: site.heads for site in anatomy.layers}
    chosen = tuple(heads) if layers is None else tuple(sorted(set(layers)))
    if not chosen or not set(chosen) <= set(heads):
        there = f"0 to {len(heads) - 1}" if list(heads) == list(range(len(heads))) else str(list(heads))
        raise PatchError(f"layers {chosen} asked for; this model has {len(heads)}, {there}; see `hf-steer inspect`.")
    if len({heads[layer] for layer in chosen}) > 1:
        raise PatchError(f"layers {chosen} have different numbers of heads; measure those of one number at a time: layers=...")
    return chosen


def _measure_layer(before: AttentionCall, after: AttentionCall | None, asked: slice, span: Tensor | None) -> Columns:
    """All columns of one layer for a stretch of queries, chunk by chunk, then off the device."""
    tables: Columns = {}
    for chunk, own, steered in _pairs(before, after, asked):
        columns = {**_describe(own, span), **({} if steered is None else _compare(own, steered, span))}
        for name, values in columns.items():
            # one table from the start: chunks kept one by one would pin the large blocks between them in the C library's heap
            table = tables.setdefault(name, values.new_zeros(*values.shape[:2], asked.stop - asked.start))
            table[..., chunk.start - asked.start : chunk.stop - asked.start] = values
    return {name: table.cpu() for name, table in tables.items()}


def _pairs(before: AttentionCall, after: AttentionCall | None, asked: slice) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Queries of a chunk, and log-probabilities of the attention without and with steering, `(batch, heads, chunk, keys)`."""
    if after is None:
        for chunk, logits, _ in logits_in_chunks(before, queries=asked):
            yield chunk, torch.log_softmax(logits, -1), None
        return
    both = zip(logits_in_chunks(before, queries=asked), logits_in_chunks(after, queries=asked), strict=True)
    for (chunk, logits, _), (_, steered, bias) in both:
        biased = steered if bias is None else steered + bias.to(steered.device)
        yield chunk, torch.log_softmax(logits, -1), torch.log_softmax(biased, -1)


def _describe(log_p: Tensor, span: Tensor | None) -> Columns:
    p = probabilities(log_p)
    surprise = -log_p.clamp(min=_MASKED) * p
    columns = {"entropy_nats": surprise.sum(-1)}
    if span is not None:
        parts = torch.stack([span, ~span], -1)[:, None].to(log_p)  # one product for inside and outside
        mass, rest = (p @ parts).unbind(-1)
        log_mass, log_rest = (part.clamp(min=_TINY).log() for part in (mass, rest))
        seeing, beside = ((log_p > _MASKED).float() @ parts > 0).unbind(-1)
        columns["span_mass"] = mass
        # -Σ (p/m)·log(p/m) over the span, from what is known already
        columns["span_entropy_nats"] = (surprise @ parts)[..., 0] / mass.clamp(min=_TINY) + log_mass * (mass > 0)
        columns["span_log_odds"] = torch.where(seeing & beside, log_mass - log_rest, math.nan)
        columns["seeing"] = seeing
    return columns


def _compare(log_p: Tensor, log_q: Tensor, span: Tensor | None) -> Columns:
    steered = _describe(log_q, span)
    names = ("entropy_nats", "span_mass", "span_entropy_nats")
    return {"kl_nats": kl_nats(log_p, log_q), **{f"steered_{name}": steered[name] for name in names if name in steered}}


def _summary(
    layers: tuple[int, ...], tables: Columns, counted: Tensor, asked: slice, *, per_query: bool
) -> AttentionMetrics:
    """From `(layers, heads, batch, asked queries)` to means, or to each query at its place in the prompt."""
    weight = counted[:, asked].expand_as(tables["entropy_nats"])
    seeing = tables.pop("seeing") & weight if "seeing" in tables else torch.zeros_like(weight)
    if "span_mass" in tables and not seeing.any():
        raise SaliencyError(
            "none of the measured queries can attend to the span: all of them come before it. Mark later ones in queries=."
        )
    values = {}
    for name, table in tables.items():
        own = seeing & ~table.isnan() if name in OVER_SPAN else weight
        if per_query:
            values[name] = torch.full((*table.shape[:3], counted.shape[1]), math.nan)
            values[name][..., asked] = table.masked_fill(~own, math.nan)
        else:
            values[name] = table.masked_fill(~own, 0).sum((2, 3)) / own.sum((2, 3))
    if "steered_entropy_nats" in values:
        values["entropy_reduction_percent"] = entropy_reduction(values["entropy_nats"], values["steered_entropy_nats"])
    span_queries = tuple(seeing[:, 0].sum((1, 2)).tolist())
    return AttentionMetrics(layers, int(counted.sum()), span_queries, **values)
