"""Examples that go through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.analysis.heads.examples import Row
from hf_steer.ground.arguments import Given, spelling_in, with_changes
from hf_steer.ground.outputs import logits_in
from hf_steer.saliency import Saliency
from hf_steer.saliency.regions import moved


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of equal length, or of which the shorter ones are padded on the right, after all that their queries can see.

    Attributes:
        numbers: which they are among all rows.
        rows: the rows.
        inputs: the model's.
        statement: what steers each of them towards its span.
        queries: `(rows,)` positions.
    """

    numbers: tuple[int, ...]
    rows: tuple[Row, ...]
    inputs: dict[str, Tensor]
    statement: Saliency
    queries: Tensor


def batches_of(rows: Sequence[Row], batch_size: int) -> list[Batch]:
    """Rows whose tensors fit together, at most `batch_size` at a time; of prompts that can be padded, those of like length."""
    alike: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        fixed = [(name, value) for name, value in sorted(row.inputs.items()) if name not in row.padded]
        shapes = tuple((name, value.dtype, value.shape[1:]) for name, value in fixed)
        query = None if row.padded else row.query
        alike.setdefault((query, row.statement.tokens is None, shapes), []).append(number)
    for members in alike.values():
        members.sort(key=lambda number: rows[number].length)
    return [
        _batch(members[start : start + batch_size], rows)
        for members in alike.values()
        for start in range(0, len(members), batch_size)
    ]


def logits_after_query(model: Any, batch: Batch) -> Tensor:
    """`(rows, vocabulary)` float32 or wider, on the model's device; of other tokens not computed where the model can leave them."""
    inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    queries = batch.queries.to(model.device)
    asked = torch.unique(queries)
    if spelling_in(model, "logits_kept") is not None:
        logits = logits_in(model(**with_changes(model, Given(inputs), logits_kept=asked)))
    else:
        logits = logits_in(model(**inputs))[:, asked]
    rows = torch.arange(len(queries), device=logits.device)
    return logits[rows, torch.searchsorted(asked, queries).to(logits.device)].float()


def _batch(numbers: Sequence[int], rows: Sequence[Row]) -> Batch:
    chosen = tuple(rows[number] for number in numbers)
    inputs = _together(chosen)
    queries = torch.tensor([row.query for row in chosen])
    if chosen[0].statement.tokens is None:
        terms = (moved(term, place) for place, row in enumerate(chosen) for term in row.statement.terms)
        return Batch(tuple(numbers), chosen, inputs, Saliency(terms=tuple(terms)), queries)
    tokens = [row.statement.tokens for row in chosen if row.statement.tokens is not None]
    longest = max(own.shape[1] for own in tokens)
    padded = [F.pad(own, (0, longest - own.shape[1])) for own in tokens]
    return Batch(tuple(numbers), chosen, inputs, Saliency.from_tokens(torch.cat(padded)), queries)


def _together(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The rows' inputs as one batch. Where lengths differ, padding is token 0, which the mask leaves out."""
    longest = max(row.length for row in rows)
    if all(row.length == longest and row.inputs.keys() == rows[0].inputs.keys() for row in rows):
        return {name: torch.cat([row.inputs[name] for row in rows]) for name in rows[0].inputs}
    tokens, mask = rows[0].padded
    columns: dict[str, list[Tensor]] = {}
    for row in rows:
        more = (0, longest - row.length)
        whole = torch.ones_like(row.inputs[tokens])
        grown = {tokens: F.pad(row.inputs[tokens], more), mask: F.pad(row.inputs.get(mask, whole), more)}
        for name, value in {**row.inputs, **grown}.items():
            columns.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in columns.items()}
