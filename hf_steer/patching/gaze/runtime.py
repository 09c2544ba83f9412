"""One forward pass, decided: from the prompt, the records and the statement to the biases of the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.attention import SteeredCall, head_bias
from hf_steer.config import AttentionConfig
from hf_steer.errors import SaliencyError
from hf_steer.ground.arguments import IGNORED_LABEL, Given
from hf_steer.ground.caches import keys_seen
from hf_steer.ground.outputs import record_in
from hf_steer.patching.gaze.arrange import read_arrangements
from hf_steer.patching.gaze.memory import CacheState, join_scores, join_spans
from hf_steer.patching.gaze.when import Pace
from hf_steer.patching.planned import Plan
from hf_steer.patching.scopes import Prompt
from hf_steer.saliency import (
    EyeRecord,
    Saliency,
    find_spans,
    normalize,
    read_layouts,
    scores_from_eyes,
    scores_from_prompt,
    scores_from_user,
)
from hf_steer.values import MODALITIES, HeadBias, Span, TokenScores


@dataclass
class Ride(SteeredCall):
    """What the hooks of one forward pass hand on to each other.

    Attributes:
        prompt: what is new in this pass; None when it only continues.
        records: what the vision tower recorded for it.
        state: of the cache, old when the pass begins and new when the decoder runs.
        statement: what the user says.
        prompt_end: key position after the prompt, inside `generate`.
        tokens: of this pass; None when only embeddings came.
        arrived: whether the decoder has got it.
        watched: whether the root model's own call surrounds this pass.
        pace: when it is steered.
        raw: scores of a new prompt before they are normalised.
    """

    prompt: Prompt | None = None
    records: list[EyeRecord] = field(default_factory=list)
    state: CacheState | None = None
    statement: Saliency | None = None
    prompt_end: int | None = None
    tokens: Tensor | None = None
    arrived: bool = False
    watched: bool = False
    pace: Pace | None = None
    raw: TokenScores | None = None


def read_prompt(given: Given, plan: Plan, statement: Saliency | None, *, past: int, whole: bool) -> Prompt | None:
    """The prompt in the arguments of a forward pass or of `generate`; None when they hold no tokens.

    Args:
        given: the arguments.
        plan: where the placeholders are, and whether they matter.
        statement: what the user says.
        past: tokens in the cache.
        whole: `generate`'s convention: token numbers repeat what the cache holds unless the mask is longer than they are.

    Raises:
        SaliencyError: placeholder tokens and pictures do not match, or nothing says where to look.
    """
    source = given.tokens()
    if source is None or not source.shape[1]:
        return None
    ids, mask, labels = (source if source.ndim == 2 else None), given.mask, given.labels
    batch, tokens = source.shape[:2]
    longer = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > tokens
    first = 0 if whole and not longer else past
    outputs = given.encoded or {}
    records = {modality: record_in(output) for modality, output in outputs.items()}
    encoded = {modality: record for modality, record in records.items() if record is not None}
    _refuse_hidden_tokens(ids, plan, statement)
    watched = bool(plan.eyes) and statement is None
    arrangements = read_arrangements(given, plan.anatomy, whole=whole) if watched else {}
    return Prompt(
        ids=ids,
        shape=(batch, tokens),
        first_position=first,
        real=real_tokens(mask, first + tokens).expand(batch, -1) if isinstance(mask, Tensor) else None,
        encoded=encoded,
        raw=tuple(modality for modality in MODALITIES if given.pixels(modality) is not None),
        arrangements=arrangements,
        spans=_new_spans(ids, given, encoded, plan, statement, first=first, past=past, whole=whole),
        labelled=None if labels is None or labels.shape != (batch, tokens) else F.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1)),
    )


def begins_prompt(given: Given, prompt: Prompt) -> bool:
    """Whether a pass begins with the prompt or a first piece of it, its rows repeated or not."""
    tokens, (batch, length) = given.tokens(), prompt.shape
    if tokens is None or tokens.shape[0] % batch:
        return False
    if prompt.ids is None or tokens.ndim != 2:
        return prompt.ids is None and tokens.shape[1] >= length
    piece = min(tokens.shape[1], length)
    begun = tokens[:: tokens.shape[0] // batch, :piece]
    return torch.equal(begun, prompt.ids[:, :piece].to(begun.device))


def real_tokens(mask: Tensor, length: int) -> Tensor:
    """`(batch, length)` bool. Columns count keys from the first, and there may be more of them than keys (static caches).

    In a 4-D mask a key is real that any query may attend to.
    """
    if mask.ndim == 4:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = allowed.flatten(1, 2).any(1)
    return F.pad(mask[:, :length].bool(), (max(0, length - mask.shape[1]), 0), value=True)


def resolve_state(
    ride: Ride, prompt: Prompt, plan: Plan, *, rows: int, past: int, device: torch.device, look: Callable[[], Tensor]
) -> CacheState:
    """The saliency of all keys once this prompt is in the cache, for the rows of this pass.

    `look` reads the prompt as the decoder gets it, for the sources that do.

    Raises:
        SaliencyError: the statement or the records do not fit the prompt, or nothing says where to look.
    """
    attention = _attention(plan)
    batch, tokens = prompt.shape
    length = prompt.first_position + tokens
    old = None if ride.state is None or past == 0 else ride.state.until(past).for_rows(batch)
    spans = prompt.spans if old is None else join_spans(old.spans, prompt.spans)
    if ride.statement is not None:
        real = torch.ones(batch, length, dtype=torch.bool) if prompt.real is None else prompt.real
        scores = scores_from_user(
            ride.statement,
            spans,
            real=real.to(device),
            first_position=past,
            temporal_patch_size=plan.anatomy.temporal_patch_size,
        )
        given = ride.statement.tokens
        adds = given is not None and given.shape[1] != length  # it speaks of the new tokens alone
    elif prompt.spans and attention.saliency.reads_prompt:
        scores = scores_from_prompt(look(), prompt.spans, first_position=past, batch=batch, length=length, device=device)
        adds = True
    else:
        wanted = prompt.spans if plan.eyes else ()
        records = {**prompt.encoded, **dict(zip(prompt.raw, ride.records, strict=False))}
        for modality in records.keys() & prompt.arrangements.keys():
            records[modality] = prompt.arrangements[modality].arrange(records[modality])
        scores = scores_from_eyes(wanted, records, batch=batch, copies=rows // batch, length=length, device=device)
        adds = True
    ride.raw = scores
    drawn = ride.statement is not None and ride.statement.tokens is None
    scores = normalize(scores, attention.saliency.normalize, attention.saliency.clip, winsorize=not drawn)
    if adds and old is not None:
        scores = join_scores(old.scores, scores)
    speaks = torch.compiler.is_compiling() or bool(scores.values.any())  # a compiled graph cannot ask
    unseen = None if old is None else old.unseen
    return CacheState(scores, spans, ride.statement, speaks=speaks, unseen=unseen).for_rows(rows)


def make_biases(
    state: CacheState,
    plan: Plan,
    strengths: Mapping[int, tuple[float, ...] | Tensor],
    *,
    cache: Any,
    queries: int,
    gate: Tensor | None,
) -> dict[int, HeadBias]:
    """Layer -> bias over the keys that the layer is about to attend to; nothing when no key has a score.

    Args:
        state: for the rows of this pass.
        plan: whether the mass is preserved.
        strengths: layer -> λ per query head.
        cache: as the decoder gets it, before it is updated; None without one.
        queries: tokens of this pass.
        gate: `(rows, queries)`, None for 1 everywhere.
    """
    preserve_mass = _attention(plan).saliency.preserve_mass
    windows: dict[tuple[int, int], tuple[TokenScores, dict[Any, Any]]] = {}
    biases: dict[tuple[tuple[int, int], tuple[float, ...] | int], HeadBias] = {}
    by_layer = {}
    for layer, values in strengths.items():
        length, offset = keys_seen(cache, queries, layer)
        place = (offset, length)
        if place not in windows:
            windows[place] = state.window(offset, length), {}
        same = (place, layer if isinstance(values, Tensor) else values)
        if same not in biases:
            scores, key_forms = windows[place]
            strength, shift = state.strength(values, preserve_mass=preserve_mass)
            biases[same] = head_bias(scores, strength, shift, gate, key_forms)
        by_layer[layer] = biases[same]
    return by_layer


def _attention(plan: Plan) -> AttentionConfig:
    if plan.config.attention is None:
        raise SaliencyError("this plan steers no attention; see AttentionConfig.")
    return plan.config.attention


def _refuse_hidden_tokens(ids: Tensor | None, plan: Plan, statement: Saliency | None) -> None:
    """Without token numbers nothing says where the pictures are; that matters where something is to be seen in them."""
    if ids is None and (statement.tokens is None if statement is not None else plan.sees):
        pictures = "; boxes, masks, maps and points need input_ids, too" if statement is not None else ""
        raise SaliencyError(
            f"inputs_embeds came without input_ids, so where to look is unknown{pictures}. Give one score per token with "
            "use_saliency(model, Saliency.from_tokens(...)), or run inside disable_steering(model)."
        )


def _new_spans(
    ids: Tensor | None,
    given: Given,
    encoded: Mapping[str, EyeRecord],
    plan: Plan,
    statement: Saliency | None,
    *,
    first: int,
    past: int,
    whole: bool,
) -> tuple[Span, ...]:
    """Pictures, videos and sounds that come after the first `past` tokens; `ids` begin at key position `first`.

    They are kept for what may be said later, even if nothing is said of them now.
    """
    placeholders = plan.anatomy.placeholder_ids
    needed = plan.sees if statement is None else statement.regions
    if ids is None or not placeholders:
        return ()
    try:
        layouts = read_layouts(given, encoded, plan.anatomy, whole=whole)
    except SaliencyError:
        if needed:
            raise
        return ()
    if not (layouts or needed):
        return ()
    fresh = ids[:, max(0, past - first) :]
    count = sum(int((fresh == token).sum()) for token in placeholders.values())
    if count == sum(layout.tokens for own in layouts.values() for layout in own):
        return find_spans(fresh, placeholders, layouts, first_position=max(past, first))
    every = find_spans(ids, placeholders, layouts, first_position=first)
    return tuple(span for span in every if int(span.positions[0]) >= past)
