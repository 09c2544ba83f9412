"""The prompt of a forward pass or of `generate`, before anything ran: its tokens, padding, pictures and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.errors import SaliencyError
from hf_steer.ground.arguments import IGNORED_LABEL, Given
from hf_steer.ground.outputs import records_in
from hf_steer.patching.gaze.arrange import Arrangement, read_arrangements
from hf_steer.patching.planned import Plan
from hf_steer.saliency import EyeRecord, Saliency, find_spans, read_layouts
from hf_steer.values import MODALITIES, Span


@dataclass(frozen=True)
class Prompt:
    """What a call says about its input, before anything ran.

    Attributes:
        ids: `(batch, tokens)`; None when only embeddings came.
        shape: batch and tokens.
        first_position: key position of the first token: 0, or the cache's length when only new tokens came.
        real: `(batch, first_position + tokens)` bool, False for padding; None when no mask came.
        encoded: modality -> what the patched tower recorded earlier, for encoder outputs that the caller passed in.
        raw: modalities whose pixels come with the call, in the order in which the model encodes them.
        arrangements: modality -> how a LLaVA lays out what its tower sees as tokens, where its eyes are wanted.
        spans: pictures and videos that this prompt adds to the cache.
        labelled: `(batch, tokens)` bool, True where the next token is a label; None without labels.
    """

    ids: Tensor | None
    shape: tuple[int, int]
    first_position: int
    real: Tensor | None
    encoded: Mapping[str, EyeRecord]
    raw: tuple[str, ...]
    arrangements: Mapping[str, Arrangement]
    spans: tuple[Span, ...]
    labelled: Tensor | None


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
    source = given.source
    if source is None or not source.shape[1]:
        return None
    ids, mask, labels = (source if source.ndim == 2 else None), given.mask, given.labels
    batch, tokens = source.shape[:2]
    longer = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > tokens
    first = 0 if whole and not longer else past
    encoded = records_in(given.encoded) if given.encoded else {}
    _refuse_unknown_places(plan, statement)
    _refuse_hidden_tokens(ids, plan, statement)
    watched = bool(plan.eyes) and statement is None
    arrangements = read_arrangements(given, plan.anatomy, whole=whole) if watched else {}
    pictures = given.image_pixels, given.video_pixels
    return Prompt(
        ids=ids,
        shape=(batch, tokens),
        first_position=first,
        real=real_tokens(mask, first + tokens).expand(batch, -1) if isinstance(mask, Tensor) else None,
        encoded=encoded,
        raw=tuple(modality for modality, pixels in zip(MODALITIES, pictures, strict=True) if pixels is not None),
        arrangements=arrangements,
        spans=_new_spans(ids, given, encoded, plan, statement, first=first, past=past, whole=whole),
        labelled=None if labels is None or labels.shape != (batch, tokens) else F.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1)),
    )


def begins_prompt(given: Given, prompt: Prompt) -> bool:
    """Whether a pass begins with the prompt or a first piece of it, its rows repeated or not."""
    tokens, (batch, length) = given.source, prompt.shape
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


def _refuse_unknown_places(plan: Plan, statement: Saliency | None) -> None:
    """What is said of pictures or sounds lands on tokens whose places are known."""
    family, known = plan.anatomy.family, tuple(plan.anatomy.placeholder_ids)
    for region in () if statement is None else statement.regions:
        if region.modality not in known:
            told = f", though it is for {' and '.join(known)}" if known else ""
            if region.modality in plan.anatomy.placed_across:
                raise SaliencyError(
                    f"something is said of {region.modality} {region.index} in row {region.row}, and the prompt of {family!r} "
                    'has no tokens for it: its decoder cross-attends to it. Patch with AttentionConfig(attends="cross"), or give '
                    "one score per token of the prompt with Saliency.from_tokens(...)."
                )
            raise SaliencyError(
                f"something is said of {region.modality} {region.index} in row {region.row}, but where each token lies in it "
                f"is not known for {family!r}{told}. Give one score per token with Saliency.from_tokens(...), or speak of the text "
                "with Saliency.from_text(...). docs/families.md lists the families where it is known; a layout of your own is one "
                "row, see docs/extending/family.md."
            )


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
    unclaimed = 0
    for token in placeholders.values():
        unclaimed += int((fresh == token).sum())
    for own in layouts.values():
        for layout in own:
            unclaimed -= layout.tokens
    if not unclaimed:
        return find_spans(fresh, placeholders, layouts, first_position=max(past, first))
    every = find_spans(ids, placeholders, layouts, first_position=first)
    return tuple(span for span in every if int(span.positions[0]) >= past)
