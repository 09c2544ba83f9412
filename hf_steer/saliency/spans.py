"""Which prompt tokens belong to which picture, video or sound."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.saliency.sounds import join_windows
from hf_steer.values import Layout, Span


def find_spans(
    ids: Tensor,
    placeholder_ids: Mapping[str, int],
    layouts: Mapping[str, Sequence[Layout]],
    *,
    first_position: int = 0,
) -> tuple[Span, ...]:
    """Deal out each row's placeholder tokens to the pictures, videos and sounds, in their order.

    Args:
        ids: token numbers, `(batch, tokens)`.
        placeholder_ids: modality -> id of its placeholder token.
        layouts: modality -> those of all pictures of the batch, row by row, as processors list them. Windows of one long sound
            become one span where no token lies between them.
        first_position: key position of `ids[:, 0]`.

    Returns:
        Spans, row by row; within a row image spans come before video spans.

    Raises:
        SaliencyError: the number of placeholder tokens and the layouts disagree.
    """
    remaining = {modality: list(layouts.get(modality, ())) for modality in placeholder_ids}
    spans: list[Span] = []
    rows = ids.detach().cpu()
    for row in range(rows.shape[0]):
        for modality, token in placeholder_ids.items():
            positions = (rows[row] == token).nonzero().flatten() + first_position
            index = 0
            while len(positions) and remaining[modality]:
                layout = remaining[modality].pop(0)
                if not 0 < layout.tokens <= len(positions):
                    _refuse(modality, rows, token, layouts)
                span = Span(modality, row, index, positions[: layout.tokens].to(ids.device), layout)
                positions = positions[layout.tokens :]
                if index and _continues(spans[-1], span):
                    spans[-1] = _joined(spans[-1], span)
                    continue
                spans.append(span)
                index += 1
            if len(positions):
                _refuse(modality, rows, token, layouts)
    for modality, rest in remaining.items():
        if rest:
            _refuse(modality, rows, placeholder_ids[modality], layouts)
    return tuple(spans)


def _continues(before: Span, span: Span) -> bool:
    return before.layout.continues and int(span.positions[0]) == int(before.positions[-1]) + 1


def _joined(before: Span, span: Span) -> Span:
    positions = torch.cat([before.positions, span.positions])
    return dataclasses.replace(before, positions=positions, layout=join_windows(before.layout, span.layout))


def _refuse(modality: str, rows: Tensor, token: int, layouts: Mapping[str, Sequence[Layout]]) -> None:
    per_row = (rows == token).sum(1).tolist()
    sizes = [layout.tokens for layout in layouts.get(modality, ())]
    raise SaliencyError(
        f"{modality} token count does not match: the prompt's rows hold {per_row} {modality} tokens, the {modality} inputs "
        f"make {sizes} tokens. Build the whole prompt with one call of the model's processor."
    )
