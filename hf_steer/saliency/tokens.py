"""From pictures and sounds to prompt tokens: scores of the model's own eyes, or the user's, laid onto key positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.ground.arguments import name_of
from hf_steer.saliency.eyes import EyeRecord
from hf_steer.saliency.given import Saliency
from hf_steer.saliency.regions import Region, said_of
from hf_steer.values import Span, TokenScores


def scores_from_eyes(
    spans: Sequence[Span], records: Mapping[str, EyeRecord], *, batch: int, copies: int, length: int, device: torch.device
) -> TokenScores:
    """Lay what the vision tower recorded onto the spans, in their order.

    Args:
        spans: of the pictures that the tower saw in this prompt, row by row.
        records: modality -> scores of all its pictures.
        batch: rows of the prompt.
        copies: how often each row is repeated for beams. Up to transformers 5.17 its pictures were encoded as often.
        length: key positions to cover.
        device: of the result.

    Raises:
        SaliencyError: the tower was not recorded, or saw another number of tokens.
    """
    scores = _blank(batch, length, device)
    for modality in {span.modality: None for span in spans}:
        own = [span for span in spans if span.modality == modality]
        if modality not in records:
            raise SaliencyError(
                f"the prompt holds {modality} tokens, but the vision tower of the patched model did not compute them "
                f"({name_of('encoded')} from elsewhere?). Take them from model.get_{modality}_features of the patched model, "
                "or give the saliency with use_saliency."
            )
        record = records[modality]
        expected = sum(len(span.positions) for span in own)
        if len(record.scores) not in (expected, copies * expected):
            raise SaliencyError(
                f"{modality} token count does not match: the prompt holds {expected}, the vision tower made "
                f"{len(record.scores)}. Build the prompt and the pixels with one call of the model's processor."
            )
        repeated = len(record.scores) // expected
        start = 0
        for row in range(batch):
            first = start
            for span in (span for span in own if span.row == row):
                count = len(span.positions)
                _lay(scores, span, record.scores[start : start + count], groups=span.layout.frames)
                start += count
            start += (repeated - 1) * (start - first)
    return scores


def scores_from_prompt(
    raw: Tensor, spans: Sequence[Span], *, first_position: int, batch: int, length: int, device: torch.device
) -> TokenScores:
    """Lay what a source of `SOURCES` makes of a prompt onto its pictures, videos and sounds.

    Args:
        raw: `(batch, tokens)` scores of the new tokens, text included.
        spans: among them.
        first_position: key position of the first of them.
        batch: rows of the prompt.
        length: key positions to cover.
        device: of the result.
    """
    scores = _blank(batch, length, device)
    for span in spans:
        values = raw[span.row, span.positions.to(raw.device) - first_position]
        _lay(scores, span, values, groups=span.layout.frames)
    return scores


def scores_from_user(
    saliency: Saliency,
    spans: Sequence[Span],
    *,
    real: Tensor,
    first_position: int,
    temporal_patch_size: int,
) -> TokenScores:
    """Lay the user's statement onto the key positions of a prompt.

    Args:
        saliency: what the user said.
        spans: of all pictures, videos and sounds of the conversation.
        real: `(batch, keys)` bool, False for padding; its length is what is to be covered.
        first_position: where the newest tokens start; token scores may cover just these.
        temporal_patch_size: video frames per grid step.

    Raises:
        SaliencyError: token scores of another length or batch; a row, picture, frame or second that is not there; a picture of
            another shape.
    """
    batch, length = real.shape
    scores = _blank(batch, length, real.device)
    if saliency.tokens is not None:
        return _token_scores(saliency.tokens, scores, real, first_position)
    first: dict[tuple[int, str, int], tuple[Span, Region]] = {}  # the region that speaks of each span first
    for region in saliency.regions:
        first.setdefault((region.row, region.modality, region.index), (_find(region, spans, batch), region))
    for span, region in first.values():
        said = said_of(span, saliency.terms, temporal_patch_size)
        if said is not None:
            fitted = span if span.layout.fit is None else replace(span, layout=span.layout.at(region.size))
            _lay(scores, fitted, said.to(real.device), groups=1)
    return scores


def _blank(batch: int, length: int, device: torch.device) -> TokenScores:
    return TokenScores(
        torch.zeros(batch, length, dtype=torch.float32, device=device),
        torch.full((batch, length), -1, dtype=torch.long, device=device),
    )


def _lay(scores: TokenScores, span: Span, values: Tensor, *, groups: int) -> None:
    """Put values on a span's tokens and number its groups: one for all that the user says, one per frame for the eyes.

    Tokens without a place in the picture belong to none.
    """
    device, count = scores.values.device, len(span.positions)
    first = int(scores.group[span.row].max()) + 1
    numbers = first + (torch.arange(count, device=device) // (count // groups)).clamp(max=groups - 1)
    placed = torch.ones(count, dtype=torch.bool, device=device)
    if span.layout.cells is not None:
        placed = ~torch.isnan(span.layout.cells).any(1).to(device)
    scores.values[span.row, span.positions] = torch.where(placed, values.to(device), 0.0)
    scores.group[span.row, span.positions] = torch.where(placed, numbers, -1)


def _token_scores(tokens: Tensor, blank: TokenScores, real: Tensor, first_position: int) -> TokenScores:
    batch, length = real.shape
    rows, given = tokens.shape
    newest = length - first_position
    if rows != batch or given not in (length, newest):
        allowed = f"({batch}, {length})" + (f" or, for the new tokens alone, ({batch}, {newest})" if first_position else "")
        raise SaliencyError(
            f"token saliency has shape ({rows}, {given}); the prompt needs {allowed}, padding included: the shape of "
            f"{name_of('ids')}."
        )
    said = slice(length - given, length)
    blank.values[:, said] = tokens.to(real.device) * real[:, said]
    blank.group[:, said] = torch.where(real[:, said], 0, -1)
    return TokenScores(blank.values, blank.group, groups=1)


def _find(region: Region, spans: Sequence[Span], batch: int) -> Span:
    there = [span.index for span in spans if (span.row, span.modality) == (region.row, region.modality)]
    if region.row >= batch or region.index not in there:
        raise SaliencyError(
            f"no {region.modality} {region.index} in row {region.row}: the prompt has {batch} rows, and row {region.row} "
            f"holds {len(there)} of them. Rows, pictures and sounds count from 0."
        )
    return next(
        span
        for span in spans
        if (span.row, span.modality, span.index) == (region.row, region.modality, region.index)
    )
