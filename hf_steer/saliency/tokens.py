"""From pictures to prompt tokens: scores of the model's own eyes, or the user's, laid onto key positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.saliency.eyes import EyeRecord
from hf_steer.saliency.given import Region, Saliency
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
                f"(mm_encoder_outputs from elsewhere?). Take them from model.get_{modality}_features of the patched model, "
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
                own_part = slice(start, start + len(span.positions))
                _lay(scores, span, record.scores[own_part], record.group[own_part])
                start = own_part.stop
            start += (repeated - 1) * (start - first)
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
        spans: of all pictures of the conversation.
        real: `(batch, keys)` bool, False for padding; its length is what is to be covered.
        first_position: where the newest tokens start; token scores may cover just these.
        temporal_patch_size: video frames per grid step.

    Raises:
        SaliencyError: token scores of another length or batch; a row, picture or frame that is not there.
    """
    batch, length = real.shape
    scores = _blank(batch, length, real.device)
    if saliency.tokens is not None:
        return _token_scores(saliency.tokens, scores, real, first_position)
    for region in saliency.regions:
        span = _find(region, spans, batch)
        frames, height, width = span.grid
        painted = region.paint.on_grid(height, width).expand(frames, height, width).clone()
        if region.frames is not None:
            first, last = region.frames
            if last > frames * temporal_patch_size:
                raise SaliencyError(
                    f"frames={region.frames} reach past the video's {frames * temporal_patch_size} sampled frames."
                )
            painted[: first // temporal_patch_size] = 0
            painted[-(-last // temporal_patch_size) :] = 0
        _lay(scores, span, painted.reshape(-1).to(real.device), torch.zeros(painted.numel(), dtype=torch.long))
    return scores


def _blank(batch: int, length: int, device: torch.device) -> TokenScores:
    return TokenScores(
        torch.zeros(batch, length, dtype=torch.float32, device=device),
        torch.full((batch, length), -1, dtype=torch.long, device=device),
    )


def _lay(scores: TokenScores, span: Span, values: Tensor, group: Tensor) -> None:
    """Add values to a span's tokens and number its groups after those that the row has: one for all that the user says, one
    per frame for the eyes; -1 says nothing."""
    group = group.to(scores.group.device)
    speaks = group >= 0
    scores.values[span.row, span.positions] += torch.where(speaks, values.to(scores.values.device), 0.0)
    if (scores.group[span.row, span.positions] < 0).all() and speaks.any():
        first = scores.group[span.row].max() + 1 - group[speaks].min()
        scores.group[span.row, span.positions] = torch.where(speaks, group + first, -1)


def _token_scores(tokens: Tensor, blank: TokenScores, real: Tensor, first_position: int) -> TokenScores:
    batch, length = real.shape
    rows, given = tokens.shape
    newest = length - first_position
    if rows != batch or given not in (length, newest):
        allowed = f"({batch}, {length})" + (f" or, for the new tokens alone, ({batch}, {newest})" if first_position else "")
        raise SaliencyError(
            f"token saliency has shape ({rows}, {given}); the prompt needs {allowed}, padding included: the shape of input_ids."
        )
    said = slice(length - given, length)
    blank.values[:, said] = tokens.to(real.device) * real[:, said]
    blank.group[:, said] = torch.where(real[:, said], 0, -1)
    return blank


def _find(region: Region, spans: Sequence[Span], batch: int) -> Span:
    there = [span.index for span in spans if (span.row, span.modality) == (region.row, region.modality)]
    if region.row >= batch or region.index not in there:
        raise SaliencyError(
            f"no {region.modality} {region.index} in row {region.row}: the prompt has {batch} rows, and row {region.row} "
            f"holds {len(there)} of them. Rows and pictures count from 0."
        )
    return next(
        span
        for span in spans
        if (span.row, span.modality, span.index) == (region.row, region.modality, region.index)
    )
