"""Which prompt tokens belong to which picture or video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.values import Span


def token_grid(grid: Sequence[int], merge_size: int) -> tuple[int, int, int]:
    """Frames, height and width in tokens, from the same in patches."""
    frames, height, width = (int(side) for side in grid)
    return frames, height // merge_size, width // merge_size


def find_spans(
    input_ids: Tensor,
    placeholder_ids: Mapping[str, int],
    grids: Mapping[str, Sequence[tuple[int, int, int]]],
    *,
    first_position: int = 0,
) -> tuple[Span, ...]:
    """Deal out each row's placeholder tokens to the pictures and videos, in their order.

    Args:
        input_ids: `(batch, tokens)`.
        placeholder_ids: modality -> id of its placeholder token.
        grids: modality -> token grids of all pictures of the batch, row by row, as processors list them.
        first_position: key position of `input_ids[:, 0]`.

    Returns:
        Spans, row by row; within a row image spans come before video spans.

    Raises:
        SaliencyError: the number of placeholder tokens and the grids disagree.
    """
    remaining = {modality: list(grids.get(modality, ())) for modality in placeholder_ids}
    spans: list[Span] = []
    rows = input_ids.detach().cpu()
    for row in range(rows.shape[0]):
        for modality, token in placeholder_ids.items():
            positions = (rows[row] == token).nonzero().flatten() + first_position
            index = 0
            while len(positions) and remaining[modality]:
                frames, height, width = grid = remaining[modality].pop(0)
                count = frames * height * width
                if count > len(positions):
                    _refuse(modality, rows, token, grids)
                spans.append(Span(modality, row, index, positions[:count].to(input_ids.device), grid))
                positions, index = positions[count:], index + 1
            if len(positions):
                _refuse(modality, rows, token, grids)
    for modality, rest in remaining.items():
        if rest:
            _refuse(modality, rows, placeholder_ids[modality], grids)
    return tuple(spans)


def _refuse(modality: str, rows: Tensor, token: int, grids: Mapping[str, Sequence[tuple[int, int, int]]]) -> None:
    per_row = (rows == token).sum(1).tolist()
    sizes = [int(torch.tensor(grid).prod()) for grid in grids.get(modality, ())]
    raise SaliencyError(
        f"{modality} token count does not match: the prompt's rows hold {per_row} {modality} tokens, the {modality} grids "
        f"make {sizes} tokens. Build the prompt and the pixels with one call of the model's processor."
    )
