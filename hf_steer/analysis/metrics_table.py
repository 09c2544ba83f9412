"""The table of `attention_metrics`, and several of them as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_steer.analysis.tables import as_csv, as_text


@dataclass(frozen=True, eq=False)
class AttentionMetrics:
    """Means over queries, `(layers, heads)` float32 each; with `per_query`, `(layers, heads, batch, tokens)`, NaN where not asked.

    What is steered is None for a model that is not patched; what concerns the span is None without one.

    Attributes:
        layers: numbers of the decoder layers that the tensors' rows stand for.
        queries: how many were measured.
        span_queries: per layer, those of them that may attend to a token of the span; a sliding window sees less far.
        entropy_nats: of the unsteered attention.
        steered_entropy_nats: likewise, steered.
        entropy_reduction_percent: of the means, `100 · (1 - steered / unsteered)`; 0 where there is none to reduce.
        kl_nats: KL(unsteered ‖ steered).
        span_mass: share of the unsteered attention on the span, 0 for queries that come before it.
        steered_span_mass: likewise, steered.
        span_entropy_nats: of the unsteered attention inside the span, renormalised, over `span_queries`; NaN where there are none.
        steered_span_entropy_nats: likewise, steered.
        span_log_odds: `log(mass / (1 - mass))` unsteered, over the queries that may attend to the span and to something else;
            NaN where there are none.
    """

    layers: tuple[int, ...]
    queries: int
    span_queries: tuple[int, ...]
    entropy_nats: Tensor
    steered_entropy_nats: Tensor | None = None
    entropy_reduction_percent: Tensor | None = None
    kl_nats: Tensor | None = None
    span_mass: Tensor | None = None
    steered_span_mass: Tensor | None = None
    span_entropy_nats: Tensor | None = None
    steered_span_entropy_nats: Tensor | None = None
    span_log_odds: Tensor | None = None

    def rows(self) -> list[dict[str, Any]]:
        """A dictionary per layer and head, and per row and query if they were asked for."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        names = ("layer", "head", "row", "query")
        return [
            {
                **dict(zip(names, (self.layers[place[0]], *place[1:]), strict=False)),
                **{name: _number(values, tuple(place)) for name, values in columns.items()},
            }
            for place in (~self.entropy_nats.isnan()).nonzero().tolist()
        ]

    def to_csv(self) -> str:
        """The rows, a header first."""
        return as_csv(self.rows())

    def __str__(self) -> str:
        return as_text(self.rows())


_COLUMNS = tuple(item.name for item in dataclasses.fields(AttentionMetrics))[3:]
OVER_SPAN = ("span_entropy_nats", "steered_span_entropy_nats", "span_log_odds")
"""Columns that only queries with a view of the span have."""


def pool(parts: Sequence[AttentionMetrics]) -> AttentionMetrics:
    """Several batches of one model as one: means weighted by their queries, without `span_log_odds`.

    Args:
        parts: with the same layers and columns, not `per_query`.
    """
    values: dict[str, Any] = {}
    for name in _COLUMNS[:-1]:
        columns = [getattr(part, name) for part in parts]
        if columns[0] is None:
            continue
        counts = [torch.tensor(part.span_queries)[:, None] if name in OVER_SPAN else part.queries for part in parts]
        weighted = [torch.where(column.isnan(), 0, column * count) for column, count in zip(columns, counts, strict=True)]
        values[name] = sum(weighted) / sum(counts)
    if "steered_entropy_nats" in values:
        values["entropy_reduction_percent"] = entropy_reduction(values["entropy_nats"], values["steered_entropy_nats"])
    seeing = tuple(sum(counts) for counts in zip(*(part.span_queries for part in parts), strict=True))
    return AttentionMetrics(parts[0].layers, sum(part.queries for part in parts), seeing, **values)


def entropy_reduction(before: Tensor, after: Tensor) -> Tensor:
    """In percent of what there was; 0 where nothing changed, also where there was none."""
    return torch.where(before == after, torch.zeros_like(before), 100 * (1 - after / before))


def _number(values: Tensor | None, place: tuple[int, ...]) -> float | None:
    """None for what was not measured or is not defined."""
    return None if values is None or values[place].isnan() else float(values[place])
