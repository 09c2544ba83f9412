"""Examples that go through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_steer.analysis.heads.examples import Row
from hf_steer.ground.arguments import Given, spelling_in, with_changes
from hf_steer.ground.outputs import logits_in
from hf_steer.saliency import Saliency
from hf_steer.saliency.regions import moved


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of equal length, with equal queries.

    Attributes:
        numbers: which they are among all rows.
        rows: the rows.
        inputs: the model's.
        statement: what steers each of them towards its span.
    """

    numbers: tuple[int, ...]
    rows: tuple[Row, ...]
    inputs: dict[str, Tensor]
    statement: Saliency


def batches_of(rows: Sequence[Row], batch_size: int) -> list[Batch]:
    """Rows whose tensors fit together, at most `batch_size` at a time."""
    alike: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        shapes = tuple((name, value.dtype, value.shape[1:]) for name, value in sorted(row.inputs.items()))
        alike.setdefault((row.query, row.statement.tokens is None, shapes), []).append(number)
    return [
        _batch(members[start : start + batch_size], rows)
        for members in alike.values()
        for start in range(0, len(members), batch_size)
    ]


def logits_after_query(model: Any, batch: Batch) -> Tensor:
    """`(rows, vocabulary)` float64 on the CPU; those of other tokens are not computed where the model can leave them out."""
    inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    query = torch.tensor([batch.rows[0].query], device=model.device)
    if spelling_in(model, "logits_kept") is not None:
        logits = logits_in(model(**with_changes(model, Given(inputs), logits_kept=query)))
    else:
        logits = logits_in(model(**inputs))[:, query]
    return logits[:, 0].cpu().double()


def _batch(numbers: Sequence[int], rows: Sequence[Row]) -> Batch:
    chosen = tuple(rows[number] for number in numbers)
    inputs = {name: torch.cat([row.inputs[name] for row in chosen]) for name in chosen[0].inputs}
    if chosen[0].statement.tokens is None:
        terms = (moved(term, place) for place, row in enumerate(chosen) for term in row.statement.terms)
        return Batch(tuple(numbers), chosen, inputs, Saliency(terms=tuple(terms)))
    tokens = [row.statement.tokens for row in chosen if row.statement.tokens is not None]
    return Batch(tuple(numbers), chosen, inputs, Saliency.from_tokens(torch.cat(tokens)))
