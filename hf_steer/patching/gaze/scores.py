"""From a prompt, what the tower saw and what the user says to one score per key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from hf_steer.attention import say_once
from hf_steer.patching.gaze.memory import CacheState, join_scores, join_spans
from hf_steer.patching.gaze.prompt import Prompt
from hf_steer.patching.passes import Pass
from hf_steer.patching.planned import Plan
from hf_steer.saliency import is_lost, put_into_effect, scores_from_eyes, scores_from_prompt, scores_from_user
from hf_steer.values import TokenScores


def resolve_state(
    current: Pass,
    prompt: Prompt,
    plan: Plan,
    *,
    rows: int,
    past: int,
    device: torch.device,
    look: Callable[[], Tensor],
) -> CacheState:
    """The saliency of all keys once this prompt is in the cache, for the rows of this pass.

    `look` reads the prompt as the decoder gets it, for the sources that do.

    Raises:
        SaliencyError: the statement or the records do not fit the prompt, or nothing says where to look.
    """
    batch, tokens = prompt.shape
    length = prompt.first_position + tokens
    old = None if current.state is None or past == 0 else current.state.until(past).for_rows(batch)
    spans = prompt.spans if old is None else join_spans(old.spans, prompt.spans)
    kind = _kind_of(current, prompt, plan, old)
    if current.statement is not None:
        real = torch.ones(batch, length, dtype=torch.bool) if prompt.real is None else prompt.real
        scores = scores_from_user(
            current.statement,
            spans,
            real=real.to(device),
            first_position=past,
            temporal_patch_size=plan.anatomy.temporal_patch_size,
        )
        given = current.statement.tokens
        adds = given is not None and given.shape[1] != length  # it speaks of the new tokens alone
    elif prompt.spans and plan.reads_prompt:
        scores = scores_from_prompt(look(), prompt.spans, first_position=past, batch=batch, length=length, device=device)
        adds = True
    else:
        wanted = prompt.spans if plan.eyes else ()
        records = {**prompt.encoded, **dict(zip(prompt.raw, current.records, strict=False))}
        for modality in records.keys() & prompt.arrangements.keys():
            records[modality] = prompt.arrangements[modality].arrange(records[modality])
        scores = scores_from_eyes(wanted, records, batch=batch, copies=rows // batch, length=length, device=device)
        adds = True
    current.raw = scores
    scores = in_effect(scores, plan, kind, told=current.statement is not None)
    if adds and old is not None:
        before, waits = _filled_in(old, plan), _waits(kind, plan)
        if old.speaks and (before.waits is not None or _waits(old.kind, plan) != waits):  # each turn keeps its own rule
            before, scores = _with_rule(before, _waits(old.kind, plan)), _with_rule(scores, waits)
        scores = join_scores(before, scores)
    speaks = torch.compiler.is_compiling() or bool(scores.values.any())  # a compiled graph cannot ask
    unseen = None if old is None else old.unseen
    state = CacheState(scores, spans, current.statement, speaks, kind, unseen=unseen)
    return state if rows == batch else state.for_rows(rows)


def in_effect(scores: TokenScores, plan: Plan, kind: str, *, told: bool) -> TokenScores:
    """Raw scores in the manner of their kind; once it is said where what the user told changes nothing.

    Raises:
        SaliencyError: a share is to be kept on what is only looked away from.
    """
    manner = plan.manners[kind]
    if told and is_lost(scores, manner):
        why = "attention moves within a picture, video or sound and not towards it" if manner.preserve_mass else (
            f"normalize={manner.normalize!r} makes equal scores zero"
        )
        say_once(
            f"what is pointed at covers a whole picture, video, sound or prompt evenly, which changes nothing there: {why}. Point "
            "at a part of it; or, to draw attention to all of it, patch with "
            "SaliencyConfig(normalize='maxabs', preserve_mass=False)."
        )
    return put_into_effect(scores, plan.config.attention, manner, kind)  # type: ignore[arg-type]


def _filled_in(old: CacheState, plan: Plan) -> TokenScores:
    """Scores of a cache with the usual λ of what was said where a configuration that left nothing open made them."""
    scores = old.scores
    if scores.usual is not None:
        return scores
    return dataclasses.replace(scores, usual=torch.full_like(scores.values, plan.manners[old.kind].strength))


def _waits(kind: str, plan: Plan) -> bool:
    """Whether only queries out of which a token is generated look at what is said of this kind."""
    return plan.config.attention.phases(kind)[0] != 1.0  # type: ignore[union-attr]


def _with_rule(scores: TokenScores, waits: bool) -> TokenScores:
    """With the rule of their kind for every key, unless each has its own already."""
    if scores.waits is not None:
        return scores
    return dataclasses.replace(scores, waits=torch.full_like(scores.values, waits, dtype=torch.bool))


def _kind_of(current: Pass, prompt: Prompt, plan: Plan, old: CacheState | None) -> str:
    """Of what is in force now, a key of `MANNERS`: a turn that says nothing, and shows nothing to a source, leaves it as it was."""
    if current.statement is not None:
        return current.statement.kind
    return old.kind if old is not None and not (prompt.spans and plan.sees) else "source"
