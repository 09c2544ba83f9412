"""One forward pass, decided: from the prompt, the records and the statement to the biases of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_steer.attention import SteeredCall, head_bias
from hf_steer.config import AttentionConfig
from hf_steer.errors import SaliencyError
from hf_steer.patching.context import Prompt
from hf_steer.patching.state import CacheState, join_scores
from hf_steer.saliency import (
    EyeRecord,
    Saliency,
    find_spans,
    normalize,
    scores_from_eyes,
    scores_from_user,
    token_grid,
)
from hf_steer.values import MODALITIES, Anatomy, HeadBias, Plan, Span, TokenScores

GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
IGNORED_LABEL = -100


@dataclass
class Ride(SteeredCall):
    """What the hooks of one forward pass hand on to each other.

    Attributes:
        prompt: what is new in this pass; None when it only continues.
        records: what the vision tower recorded for it.
        state: of the cache, old when the pass begins and new when the decoder runs.
        statement: what the user says.
        prompt_end: key position after the prompt, inside `generate`.
    """

    prompt: Prompt | None = None
    records: list[EyeRecord] = field(default_factory=list)
    state: CacheState | None = None
    statement: Saliency | None = None
    prompt_end: int | None = None


def read_prompt(named: Mapping[str, Any], *, past: int, whole: bool) -> Prompt | None:
    """The prompt in the arguments of a forward pass or of `generate`; None when they hold no tokens.

    Args:
        named: arguments by name.
        past: tokens in the cache.
        whole: `generate`'s convention: `input_ids` repeat what the cache holds unless the mask is longer than they are.
    """
    ids, embeds, mask = named.get("input_ids"), named.get("inputs_embeds"), named.get("attention_mask")
    if ids is not None and embeds is not None and ids.shape[:2] != embeds.shape[:2]:
        ids = None
    source = embeds if ids is None else ids
    if source is None or source.ndim < 2 or not source.shape[1]:
        return None
    batch, tokens = source.shape[:2]
    two_dimensional = isinstance(mask, Tensor) and mask.ndim == 2
    repeats = whole and (not two_dimensional or mask.shape[1] == tokens)  # type: ignore[union-attr]
    first = 0 if repeats else past
    encoded = named.get("mm_encoder_outputs") or {}
    labels = named.get("labels")
    return Prompt(
        input_ids=ids,
        shape=(batch, tokens),
        first_position=first,
        real=_real(mask, first + tokens) if two_dimensional else None,
        grids={modality: named[name] for modality, name in GRIDS.items() if named.get(name) is not None},
        encoded={modality: getattr(output, "hf_steer", None) for modality, output in encoded.items() if output is not None},
        raw=tuple(modality for modality in MODALITIES if named.get(PIXELS[modality]) is not None),
        labelled=None if labels is None else torch.nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1)),
    )


def _real(mask: Tensor, length: int) -> Tensor:
    """`(batch, length)` bool; a mask that covers only the newest tokens says nothing of the older ones."""
    return torch.nn.functional.pad(mask[:, -length:].bool(), (max(0, length - mask.shape[1]), 0), value=True)


def resolve_state(ride: Ride, prompt: Prompt, plan: Plan, *, past: int, device: torch.device) -> CacheState:
    """The saliency of all keys once this prompt is in the cache, for the prompt's own rows.

    Raises:
        SaliencyError: the statement or the records do not fit the prompt, or nothing says where to look.
    """
    attention = _attention(plan)
    batch, tokens = prompt.shape
    length = prompt.first_position + tokens
    old = None if ride.state is None else ride.state.until(past).for_rows(batch)
    _refuse_hidden_tokens(prompt, ride.statement, plan)
    records = {**prompt.encoded, **dict(zip(prompt.raw, ride.records, strict=False))}
    seen = {modality: record for modality, record in records.items() if record is not None}
    new_spans = _new_spans(prompt, ride.statement, plan, seen, past)
    spans = (old.spans if old is not None else ()) + new_spans
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
    else:
        wanted = new_spans if plan.eyes else ()
        scores = scores_from_eyes(wanted, seen, batch=batch, length=length, device=device)
        adds = True
    scores = normalize(scores, attention.saliency.normalize, attention.saliency.clip)
    if adds and old is not None:
        scores = join_scores(old.scores, scores)
    strengths = torch.tensor([plan.strengths[layer] for layer in sorted(plan.strengths)], device=device)
    return CacheState(scores, spans, strengths, ride.statement, speaks=bool(scores.values.any()))


def make_biases(
    state: CacheState, plan: Plan, *, cache: Any, queries: int, gate: Tensor | None
) -> dict[int, HeadBias]:
    """Layer -> bias over the keys that the layer is about to attend to; nothing when no key has a score.

    Args:
        state: for the rows of this pass.
        plan: which layers.
        cache: as the decoder gets it, before it is updated; None without one.
        queries: tokens of this pass.
        gate: `(rows, queries)`, None for 1 everywhere.
    """
    attention = _attention(plan)
    windows: dict[tuple[int, int], TokenScores] = {}
    biases: dict[tuple[tuple[int, int], tuple[float, ...]], HeadBias] = {}
    by_layer = {}
    for number, layer in enumerate(sorted(plan.strengths)):
        length, offset = (queries, 0) if cache is None else cache.get_mask_sizes(queries, layer)
        place = (offset, length)
        if place not in windows:
            windows[place] = state.window(offset, length)
        same = (place, plan.strengths[layer])
        if same not in biases:
            biases[same] = head_bias(
                windows[place], state.strengths[number], gate, preserve_mass=attention.saliency.preserve_mass
            )
        by_layer[layer] = biases[same]
    return by_layer


def make_gate(ride: Ride, plan: Plan, *, rows: int, queries: int, past: int | Tensor, device: torch.device) -> Tensor | None:
    """`(rows, queries)`: 1 for the queries to steer; None for all of them.

    Inside `generate` a token is generated out of every position from the prompt's last on. In a forward pass of its own
    these are the positions before a label; without labels, the last real token of each row.
    """
    if _attention(plan).queries == "all":
        return None
    if ride.prompt_end is not None:
        position = past + torch.arange(queries, device=device)
        return (position >= ride.prompt_end - 1).float().expand(rows, queries)
    if ride.prompt is None:
        return None
    if ride.prompt.labelled is not None:
        return ride.prompt.labelled.to(device).float()
    last = torch.full((rows, 1), queries - 1, device=device)
    if ride.prompt.real is not None:
        new = ride.prompt.real[:, -queries:].to(device)
        last = (new * torch.arange(1, queries + 1, device=device)).argmax(1, keepdim=True)
    return torch.zeros(rows, queries, device=device).scatter(1, last, 1.0)


def _attention(plan: Plan) -> AttentionConfig:
    if plan.config.attention is None:
        raise SaliencyError("this plan steers no attention; see AttentionConfig.")
    return plan.config.attention


def _refuse_hidden_tokens(prompt: Prompt, statement: Saliency | None, plan: Plan) -> None:
    """Without `input_ids` nothing says where the pictures are."""
    if prompt.input_ids is None and (statement is None or statement.tokens is None):
        pictures = "; boxes, masks, maps and points need input_ids, too" if statement is not None else ""
        raise SaliencyError(
            f"inputs_embeds came without input_ids, so where to look is unknown{pictures}. Give one score per token with "
            "use_saliency(model, Saliency.from_tokens(...)), or run inside disable_steering(model)."
        )


def _new_spans(
    prompt: Prompt, statement: Saliency | None, plan: Plan, records: Mapping[str, EyeRecord], past: int
) -> tuple[Span, ...]:
    """Pictures and videos that this prompt adds to the cache."""
    anatomy = plan.anatomy
    if prompt.input_ids is None or not anatomy.placeholder_ids:
        return ()
    grids = _token_grids(prompt, records, anatomy)
    needed = plan.eyes if statement is None else statement.regions
    if not grids and not needed:
        return ()
    fresh = prompt.input_ids[:, max(0, past - prompt.first_position) :]
    counts = sum(int((fresh == anatomy.placeholder_ids[modality]).sum()) for modality in anatomy.placeholder_ids)
    if counts == sum(t * h * w for sizes in grids.values() for t, h, w in sizes):
        return find_spans(fresh, anatomy.placeholder_ids, grids, first_position=max(past, prompt.first_position))
    every = find_spans(prompt.input_ids, anatomy.placeholder_ids, grids, first_position=prompt.first_position)
    return tuple(span for span in every if int(span.positions[0]) >= past)


def _token_grids(
    prompt: Prompt, records: Mapping[str, EyeRecord], anatomy: Anatomy
) -> dict[str, list[tuple[int, int, int]]]:
    grids = {modality: list(record.grids) for modality, record in records.items()}
    for modality, patches in prompt.grids.items():
        grids[modality] = [token_grid(grid, anatomy.merge_size) for grid in patches.tolist()]
    return grids
