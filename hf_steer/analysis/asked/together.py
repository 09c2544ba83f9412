"""Prompts that `generate` takes together: texts, padded on the left; pictures and sounds one by one, since they may be large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.analysis.asked.prompts import Asked
from hf_steer.ground.arguments import Given, named
from hf_steer.ground.decoders import reads_encoder
from hf_steer.saliency import Saliency

ROWS = 8
"""Texts of a batch."""
Group = tuple[list[Asked], dict[str, Tensor], Saliency]


def together(asked: Sequence[Asked], model: Any, *, rows: int = ROWS) -> list[Group]:
    """The prompts in their order, with the inputs and the statement of each batch."""
    groups: list[list[Asked]] = []
    for one in asked:
        plain = _is_text(one) and not reads_encoder(model)
        if plain and groups and _is_text(groups[-1][-1]) and len(groups[-1]) < rows:
            groups[-1].append(one)
        else:
            groups.append([one])
    return [_padded(group) if len(group) > 1 else (group, group[0].inputs, group[0].said) for group in groups]


def _is_text(asked: Asked) -> bool:
    return set(asked.inputs) == set(named(ids=0, mask=0)) and asked.said.tokens is not None


def _padded(group: list[Asked]) -> Group:
    """Of one batch; padding is token 0, which the mask leaves out."""
    longest = max(one.inputs[name].shape[1] for one in group for name in one.inputs)
    columns: dict[str, list[Tensor]] = {"ids": [], "mask": [], "said": []}
    for one in group:
        given = Given(one.inputs)
        more = (longest - given.ids.shape[1], 0)
        parts = {"ids": given.ids, "mask": given.mask, "said": one.said.tokens}
        for name, value in parts.items():
            columns[name].append(F.pad(value, more))
    whole = {name: torch.cat(values) for name, values in columns.items()}
    return group, named(ids=whole["ids"], mask=whole["mask"]), Saliency.from_tokens(whole["said"])
