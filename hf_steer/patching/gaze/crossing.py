"""Gazes at what an encoder hands on: scores of its positions, for decoders that read it by cross-attention.

The keys are the encoder's, the same in every pass of a call, so nothing is learned of them from the prompt. What was said rides on
the cache of the decoder's own keys, and goes where its rows go.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.ground.arguments import Given
from hf_steer.patching.gaze.memory import CacheState, read_state
from hf_steer.patching.gaze.prompt import real_tokens
from hf_steer.patching.gaze.scores import in_effect
from hf_steer.patching.passes import Pass
from hf_steer.patching.planned import Plan
from hf_steer.patching.scopes import Scope, Stretch
from hf_steer.saliency import Saliency, frames_of, read_layouts, scores_from_user
from hf_steer.values import Span, TokenScores


def begin_crossing(current: Pass, given: Given, said: Saliency | None) -> None:
    """Settle for one pass whether it is steered: where something is said, or its cache carries what was."""
    current.state = None if given.cache is None else read_state(given.cache)
    current.statement = current.scope.saliency if said is None else said
    current.steers = current.statement is not None or (current.state is not None and current.state.speaks)


def state_across(current: Pass, plan: Plan, given: Given, *, rows: int, device: torch.device) -> CacheState | None:
    """The saliency of what the encoder has handed on, for the rows of this pass; None where nothing is known of it.

    Raises:
        SaliencyError: the statement does not fit what the encoder handed on, or names something in a prompt.
    """
    statement, old = current.statement, current.state
    if statement is None or (old is not None and old.statement is statement):
        return old
    if given.encoder_states is None:
        raise SaliencyError(
            "this pass brings nothing that an encoder has handed on, so there is nothing to look at. Give the encoder's input or "
            "output to the call, or say where to look in the call that does."
        )
    states: Tensor = given.encoder_states
    places = states.shape[:-1].numel() // max(1, rows)  # Mllama hands the tiles of a row on one by one
    scores = _scores(statement, current, plan, given, rows=rows, places=places, device=device)
    scores = in_effect(scores, plan, statement.kind, told=True)
    speaks = torch.compiler.is_compiling() or bool(scores.values.any())
    return CacheState(scores, (), statement, speaks, statement.kind)


def _scores(
    statement: Saliency, current: Pass, plan: Plan, given: Given, *, rows: int, places: int, device: torch.device
) -> TokenScores:
    """One score per position of the encoder: the statement's rows, repeated as the decoder's are."""
    scope = current.scope
    if statement.tokens is not None and statement.tokens.shape[1] != places:
        raise SaliencyError(
            f"token saliency has {statement.tokens.shape[1]} scores a row; the encoder hands on {places} positions, padding "
            "included, and each needs one."
        )
    stretch, source = scope.stretch, scope.source
    if stretch is None and source is not None and source.seconds:  # what language it is in is asked first
        count = source.rows
        stretch = Stretch(tuple(range(count)), (0.0,) * count, source.seconds)
    if stretch is not None:
        return _of_stretch(statement, stretch, plan, rows=rows, places=places, device=device)
    batch = _rows_said(statement, scope, rows)
    mask = given.encoder_mask
    real = torch.ones(batch, places, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and mask.ndim in (2, 4) and mask.shape[-1] == places:
        real = real_tokens(mask, places).to(device)[:: max(1, rows // batch)][:batch]
    if any(region.modality == "image" for region in statement.regions):
        _refuse_unplaced(statement, plan, places)
        spans = _pictures(current, plan, rows=rows, batch=batch, places=places)
    else:
        spans = _sounds(statement, plan, [0.0] * batch, places)
    scores = scores_from_user(statement, spans, real=real, first_position=0, temporal_patch_size=1)
    return _repeated(scores, torch.arange(batch, device=device).repeat_interleave(rows // batch))


def _of_stretch(
    statement: Saliency, stretch: Stretch, plan: Plan, *, rows: int, places: int, device: torch.device
) -> TokenScores:
    """Of a stretch of long sounds: what is said of them as far as it falls into it."""
    if rows % len(stretch.rows):
        raise SaliencyError(
            f"{rows} rows are decoded for {len(stretch.rows)} sounds, so which is which is not known: some are tried again at "
            "another temperature. Transcribe them one by one, or with a single temperature."
        )
    batch = max(max(stretch.rows) + 1, _rows_named(statement))
    starts = [0.0] * batch
    for row, start in zip(stretch.rows, stretch.starts_seconds, strict=True):
        starts[row] = start
    if statement.tokens is not None and any(starts):
        statement = _later(statement, plan, stretch, starts)
    real = torch.ones(batch, places, dtype=torch.bool, device=device)
    spans = _sounds(statement, plan, starts, places, stretch.whole_seconds)
    scores = scores_from_user(statement, spans, real=real, first_position=0, temporal_patch_size=1)
    chosen = torch.tensor(stretch.rows, device=device)
    return _repeated(scores, chosen.repeat_interleave(rows // len(chosen)))


def _later(statement: Saliency, plan: Plan, stretch: Stretch, starts_seconds: list[float]) -> Saliency:
    """One score per position of a window, from where each row goes on in it: a sound of one window may be decoded in several
    stretches, too, since a timestamp that is written ends one."""
    step, tokens = plan.anatomy.frame_seconds, statement.tokens
    if step is None or tokens is None or stretch.whole_seconds > step * (tokens.shape[1] + 0.5):
        raise SaliencyError(
            "one score per position of the encoder speaks of one window, and this sound is longer. Say where to listen in seconds: "
            "Saliency.from_seconds(...)."
        )
    moved = torch.zeros_like(tokens)
    for row, start in enumerate(starts_seconds[: len(tokens)]):
        rest = tokens[row, round(start / step) :]
        moved[row, : len(rest)] = rest
    return dataclasses.replace(statement, tokens=moved)


def _rows_said(statement: Saliency, scope: Scope, rows: int) -> int:
    """How many rows a statement speaks of; the decoder has as many, or a multiple for beams."""
    if statement.tokens is None:
        source = rows if scope.source is None else scope.source.rows
        return source if source and rows % source == 0 else rows
    batch = int(statement.tokens.shape[0])
    if rows % batch:
        raise SaliencyError(f"the saliency speaks of {batch} rows, and the decoder has {rows}; give one row of scores for each.")
    return batch


def _rows_named(statement: Saliency) -> int:
    named = [region.row + 1 for region in statement.regions]
    return max(named, default=0 if statement.tokens is None else len(statement.tokens))


def _sounds(
    statement: Saliency, plan: Plan, starts_seconds: list[float], places: int, whole_seconds: float = 0.0
) -> tuple[Span, ...]:
    """Each row's sound, as far as the statement speaks of sounds."""
    if not statement.regions:
        return ()
    step = plan.anatomy.frame_seconds
    _refuse_unplaced(statement, plan, places)
    assert step is not None
    layouts = (frames_of(places, step, start, whole_seconds) for start in starts_seconds)
    return tuple(Span("audio", row, 0, torch.arange(places), layout) for row, layout in enumerate(layouts))


def _refuse_unplaced(statement: Saliency, plan: Plan, places: int) -> None:
    """SaliencyError where something is said of what has no known places among those that the encoder hands on."""
    nouns = {"image": "pictures", "video": "videos", "audio": "seconds"}
    for region in statement.regions:
        if region.modality not in plan.anatomy.placed_across:
            raise SaliencyError(
                f"where {nouns[region.modality]} lie among what the encoder of {plan.anatomy.family!r} hands on is not known; give "
                f"one score for each of its {places} positions: Saliency.from_tokens(scores)."
            )


def _pictures(current: Pass, plan: Plan, *, rows: int, batch: int, places: int) -> tuple[Span, ...]:
    """Each row's pictures, as the encoder hands them on one after the other."""
    given = Given({}) if current.given is None else current.given
    layouts = read_layouts(given, {}, plan.anatomy, whole=False)["image"]
    many, step = len(layouts) // rows, rows // batch  # pictures that a row may have; how often each row comes
    spans: list[Span] = []
    for row in range(batch):
        first = 0
        for index, layout in enumerate(layouts[row * step * many : (row * step + 1) * many]):
            if layout.fit is not None:  # the others of a row that has fewer pictures than another
                spans.append(Span("image", row, index, first + torch.arange(layout.tokens), layout))
            first += layout.tokens
        if first != places:
            raise SaliencyError(
                f"the encoder hands on {places} positions of row {row}, and its pictures make {first}. Build the prompt and the "
                "pixels with one call of the model's processor, or give one score per position with Saliency.from_tokens(...)."
            )
    return tuple(spans)


def _repeated(scores: TokenScores, rows: Any) -> TokenScores:
    return scores.each(lambda own: own[rows])
