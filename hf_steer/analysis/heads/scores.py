"""What each head's attention says: how much of it lies on the picture, where in the picture, and how compactly.

The rule "localisation" is that of Kang et al., "Your Large Vision-Language Model Only Needs A Few Attention Heads For Visual
Grounding" (CVPR 2025, https://arxiv.org/abs/2503.06287):

    a^{l,h}       attention of the query to the picture's tokens      `attention[layer, head]`
    S_img^{l,h}   its sum, averaged over examples                     `mass`
    tau           elbow of the sorted S_img                           `elbow(mass)`
    H(A^{l,h})    spatial entropy                                     `spatial_entropy`
    frequency     of being among an example's 10 lowest H             `localisation`

The elbow is where the sorted curve is farthest from its chord, as in the authors' code; components are 8-connected and weigh
what their attention exceeds the mean by. Where we differ: the authors leave out the first two layers and, per example, heads
that look at the bottom row, which they found to be sinks of the models they used; here every head takes part, and an elbow
with ten heads or fewer above it ranks them by their mean entropy. Frames of a video and several pictures do not touch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_steer.analysis.heads.batches import Batch, logits_after_query
from hf_steer.analysis.heads.examples import Row
from hf_steer.attention import AttentionCall, logits_in_chunks
from hf_steer.ground.parts import Site
from hf_steer.patching import disable_steering, get_steer_status, probe_attention

PER_EXAMPLE = 10
"""Heads of lowest spatial entropy that each example votes for."""
_FLAT = 1e-6
"""Share of the mean by which attention must exceed it: rounding would otherwise find components in a constant map."""


def unsteered(model: Any) -> AbstractContextManager[None]:
    """The model as it is without steering, patched or not."""
    return disable_steering(model) if get_steer_status(model).patched else nullcontext()


@torch.no_grad()
def look(model: Any, batches: Sequence[Batch], title: str, *, sites: Sequence[Site]) -> Iterator[tuple[int, Row, Tensor]]:
    """Run every batch unsteered, and read where the queries look.

    Args:
        model: patched or not.
        batches: of examples.
        title: of the progress bar.
        sites: whose attention is read.

    Yields:
        Number of the row, the row, and the attention of its query to the places that its span is compared with, `(layers, heads,
        places)` float64; over all keys it sums to 1.
    """
    for batch in tqdm(batches, desc=f"{title:<24}", unit="batch", leave=False):
        seen: dict[int, Tensor] = {}

        def read(call: AttentionCall, queries: Tensor = batch.queries, seen: dict[int, Tensor] = seen) -> None:
            seen[call.layer] = weights_at(call, queries)

        with unsteered(model), probe_attention(model, read, sites=sites):
            logits_after_query(model, batch)
        attention = torch.stack([seen[layer] for layer in sorted(seen)], 1).double()
        for place, (number, row) in enumerate(zip(batch.numbers, batch.rows, strict=True)):
            yield number, row, attention[place][:, :, row.media]


def weights_at(call: AttentionCall, queries: Tensor) -> Tensor:
    """`(rows, heads, keys)` float32 on the CPU: what each row's query attends to."""
    found = torch.zeros(len(queries), call.query.shape[1], call.key.shape[2])
    for query in torch.unique(queries).tolist():
        _, own, _ = next(logits_in_chunks(call, queries=slice(query, query + 1)))
        rows = queries == query
        found[rows] = torch.softmax(own[:, :, 0], -1).cpu()[rows]
    return found


def attention_scores(looks: Iterable[tuple[int, Row, Tensor]]) -> dict[str, Tensor]:
    """Scores per head, each `(layers, heads)` float64, averaged over examples.

    Returns:
        `mass`: attention to the vision or audio tokens, or in a text to all but its first token. `span_mass`: to those in the
        span. `selectivity`: span_mass less what the span would get if its tokens got what the others get on average. `pointing`:
        share of examples in which the most attended of these tokens is in the span. Where all grids are known also `entropy`, the
        mean spatial entropy in nats, and `localisation`, the share of examples in which the head is among the `PER_EXAMPLE` of
        lowest entropy above the elbow of `mass`.
    """
    rows, entropies = [], []
    for _, row, attention in looks:
        rows.append(_row_scores(row, attention))
        if row.grids is not None:
            entropies.append(spatial_entropy(attention, row.grids))
    scores = {name: torch.stack([row[name] for row in rows]).mean(0) for name in rows[0]}
    if len(entropies) == len(rows):
        every = torch.stack(entropies)
        scores |= {"entropy": every.mean(0), "localisation": localisation(scores["mass"], every)}
    return scores


def _row_scores(row: Row, attention: Tensor) -> dict[str, Tensor]:
    span, others = attention[..., row.target].sum(-1), attention[..., ~row.target].mean(-1)
    return {
        "mass": attention.sum(-1),
        "span_mass": span,
        "selectivity": span - others * row.target.sum(),
        "pointing": points_at(row, attention),
    }


def points_at(row: Row, attention: Tensor) -> Tensor:
    """1 where the most attended token of the picture is in the span, else 0: `(..., tokens)` -> `(...)` float64."""
    return row.target[attention.argmax(-1)].double()


def pointing_hits(
    model: Any, batches: Sequence[Batch], sites: Sequence[Site], sets: Sequence[Sequence[tuple[int, int]]]
) -> Tensor:
    """`(sets, examples)`: 1 where the most attended token, by the sum of the set's attention, is in the span."""
    found = torch.zeros(len(sets), sum(len(batch.numbers) for batch in batches), dtype=torch.float64)
    for number, row, attention in look(model, batches, "report", sites=sites):
        for place, heads in enumerate(sets):
            layers, numbers = zip(*heads, strict=True)
            found[place, number] = points_at(row, attention[list(layers), list(numbers)].sum(0))
    return found


def spatial_entropy(attention: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Entropy over the connected components of above-average attention: 0 where all of it is one spot.

    Args:
        attention: `(..., tokens)`, picture by picture.
        grids: frames, height and width of each picture, in tokens.

    Returns:
        `(...)` nats. A constant map, which has no component, gets the largest value there is, log(tokens).
    """
    mean = attention.mean(-1, keepdim=True)
    excess = torch.where(attention > mean * (1 + _FLAT), attention - mean, 0.0)
    sizes = [frames * height * width for frames, height, width in grids]
    parts = []
    for picture, (frames, height, width) in zip(excess.split(sizes, -1), grids, strict=True):
        maps = picture.reshape(-1, 1, height, width)
        weights = torch.zeros(len(maps), height * width + 1, dtype=maps.dtype)
        weights.scatter_add_(1, _components(maps > 0).flatten(1), maps.flatten(1))
        parts.append(weights.view(*attention.shape[:-1], frames * (height * width + 1)))
    share = torch.cat(parts, -1)
    total = share.sum(-1)
    share = share / total.clamp(min=torch.finfo(share.dtype).tiny)[..., None]
    return torch.where(total > 0, -torch.xlogy(share, share).sum(-1), math.log(attention.shape[-1]))


def _components(above: Tensor) -> Tensor:
    """`(maps, 1, height, width)` bool -> a number per 8-connected component, 0 outside: the highest number spreads."""
    height, width = above.shape[-2:]
    labels = torch.arange(1, height * width + 1, dtype=torch.float64).view(1, 1, height, width) * above
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * above
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def localisation(mass: Tensor, entropies: Tensor) -> Tensor:
    """How often each head is among the `PER_EXAMPLE` of lowest entropy above the elbow.

    Args:
        mass: `(layers, heads)`.
        entropies: `(examples, layers, heads)`.

    Returns:
        `(layers, heads)` share of examples. Heads of equal entropy take their turn by mass.
    """
    flat = mass.flatten()
    order = flat.argsort(descending=True, stable=True)
    order = order[flat[order] >= elbow(flat)]
    lowest = entropies.flatten(1)[:, order].argsort(dim=1, stable=True)[:, :PER_EXAMPLE]
    votes = torch.zeros_like(flat)
    votes.scatter_add_(0, order[lowest].flatten(), torch.ones(lowest.numel(), dtype=votes.dtype))
    return (votes / len(entropies)).view_as(mass)


def elbow(values: Tensor) -> float:
    """The value at which the sorted curve is farthest from the line between its ends."""
    curve = values.sort().values
    position = torch.linspace(0, 1, len(curve), dtype=curve.dtype)
    chord = curve[0] + position * (curve[-1] - curve[0])
    return float(curve[(curve - chord).abs().argmax()])
