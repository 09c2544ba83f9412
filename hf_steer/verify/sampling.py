"""Sampled heads of a real pass: what goes into a decoder layer's attention, and what the function underneath makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_steer.ground.attention_call import AttentionCall
from hf_steer.testing.report import CannotShow
from hf_steer.verify.masks import Allowed, allowed_of

QUERIES = 32
"""Of a head, at most, evenly spread, the last one included."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One head of one row in one layer of one pass; all numbers on the CPU, in float64.

    Attributes:
        layer: its number.
        head: query head.
        row: of the batch.
        query: `(queries, head_dim)`.
        key: `(keys, head_dim)`.
        value: `(keys, value_dim)`.
        scale: factor on the products.
        cap: products are bent by `cap · tanh(product / cap)`; None where they are not.
        added: `(queries, keys)`: what the model itself adds to the logits, its mask included; minus infinity where a key is masked.
        bias: `(queries, keys)`: what the steering adds; None where it adds nothing.
        sink: a logit that goes to no key; None without.
        output: `(queries, value_dim)`, as the function underneath gave it.
        dtype: of what it gave.
    """

    layer: int
    head: int
    row: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    cap: float | None
    added: Tensor
    bias: Tensor | None
    sink: float | None
    output: Tensor
    dtype: torch.dtype


class Sampler:
    """Reads chosen heads of chosen layers in all passes that it is shown.

    Args:
        heads: layer -> query heads.
        rows: of the batch.

    Attributes:
        samples: in the order of the passes.
        biased: layer -> the heads to which a bias was handed in any of the passes; empty where none was.
        failed: why a sample could not be read; None where all could.
    """

    def __init__(self, heads: Mapping[int, tuple[int, ...]], rows: tuple[int, ...]) -> None:
        self.heads, self.rows = heads, rows
        self.samples: list[Sample] = []
        self.biased: dict[int, tuple[int, ...]] = {}
        self.failed: str | None = None

    def read(self, call: AttentionCall) -> Callable[[Any], None] | None:
        """What a layer is about to attend with."""
        layer = call.layer
        self.biased[layer] = tuple(sorted({*self.biased.get(layer, ()), *heads_of(call)}))
        if layer not in self.heads or self.failed is not None:
            return None
        return lambda result: self._take(call, result[0])

    def _take(self, call: AttentionCall, output: Tensor) -> None:
        try:
            allowed = allowed_of(call)
            self.samples += [_sample(call, output, allowed, row, head) for row in self.rows for head in self.heads[call.layer]]
        except CannotShow as reason:
            self.failed = str(reason)


def heads_of(call: AttentionCall) -> tuple[int, ...]:
    """The heads to which a bias is handed."""
    if call.bias is None:
        return ()
    strong = call.bias.query.detach().abs().amax(dim=(0, 2, 3))
    return tuple(strong.nonzero()[:, 0].tolist())


def _sample(call: AttentionCall, output: Tensor, allowed: Allowed, row: int, head: int) -> Sample:
    queries = torch.linspace(0, call.queries - 1, min(QUERIES, call.queries)).round().long()
    group = head // (call.query.shape[1] // call.key.shape[1])
    added = allowed(row, head, queries)
    if call.added is not None:
        own = call.added.expand(len(call.query), call.query.shape[1], call.queries, -1)
        added = added + _exact(own[row, head, queries.to(own.device), : added.shape[1]])
    sinks = call.options.get("s_aux")
    return Sample(
        layer=call.layer,
        head=head,
        row=row,
        query=_exact(call.query[row, head])[queries],
        key=_exact(call.key[row, group]),
        value=_exact(call.value[row, group]),
        scale=float(call.scale),
        cap=call.cap,
        added=added,
        bias=_bias(call, row, head, queries),
        sink=None if sinks is None else float(sinks.detach().reshape(-1)[head]),
        output=_exact(output[row, :, head])[queries],
        dtype=output.dtype,
    )


def _bias(call: AttentionCall, row: int, head: int, queries: Tensor) -> Tensor | None:
    """Entry by entry, out of its two factors."""
    if call.bias is None:
        return None
    factor = _exact(call.bias.query.expand(len(call.query), -1, call.queries, -1)[row, head])[queries]
    return factor @ _exact(call.bias.key.expand(len(call.query), -1, -1)[row]).T


def _exact(values: Tensor) -> Tensor:
    return values.detach().cpu().double()
