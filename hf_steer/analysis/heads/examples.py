"""What heads are looked for with: prompts, where to look in them, and what to answer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.errors import ConfigError, SaliencyError
from hf_steer.ground.arguments import Given, name_of
from hf_steer.ground.parts import Anatomy
from hf_steer.ground.settings import setting, text_settings
from hf_steer.patching.gaze.prompt import real_tokens
from hf_steer.saliency import Saliency, find_spans, read_layouts, scores_from_user
from hf_steer.values import MODALITIES, Layout, Span

_COVERED = 0.5
"""A token belongs to a span when it scores at least this share of the highest score: a box rarely ends where tokens end."""


@dataclass(frozen=True, eq=False)
class HeadExample:
    """One prompt, one place to look.

    Attributes:
        inputs: the model's inputs, tensors of one row, as the processor makes them. To measure the answer's attention, the
            tokens that come before the answer (a thought, say) are appended already.
        span: where a grounding head looks: a bool tensor over the prompt's tokens (later tokens are no part of it), or a
            `Saliency` of row 0, such as `Saliency.from_boxes(box, image.size)`. It lies on vision or audio tokens.
        answer: id of the token that is right after the query; None to go by attention alone.
        query: position of the token whose attention is measured, and out of which the answer comes; negative counts from the last.
    """

    inputs: Mapping[str, Tensor]
    span: Tensor | Saliency
    answer: int | None = None
    query: int = -1


@dataclass(frozen=True, eq=False)
class Row:
    """An example, checked and resolved.

    Attributes:
        inputs: tensors of one row.
        query: its position.
        answer: id of the right token, if there is one.
        statement: what steers towards the span.
        media: `(tokens,)` positions of the vision or audio tokens, picture by picture.
        target: `(tokens,)` bool: which of them are in the span.
        grids: frames, height and width of each picture or sound, in the order of `media`; None where that is not known.
    """

    inputs: dict[str, Tensor]
    query: int
    answer: int | None
    statement: Saliency
    media: Tensor
    target: Tensor
    grids: tuple[tuple[int, int, int], ...] | None


def resolve_examples(examples: Sequence[HeadExample], anatomy: Anatomy) -> list[Row]:
    """Check every example against the model; each fault names the example.

    Raises:
        ConfigError: not a HeadExample, inputs that are not one row of tensors, a query or answer that is not there.
        SaliencyError: no vision or audio token, or a span that is empty, outside the picture or all of it.
    """
    rows = []
    for number, example in enumerate(examples):
        try:
            rows.append(_resolve(example, anatomy))
        except (ConfigError, SaliencyError) as error:
            raise type(error)(f"example {number}: {error}") from error
    return rows


def _resolve(example: HeadExample, anatomy: Anatomy) -> Row:
    if not isinstance(example, HeadExample):
        raise ConfigError(f"examples are HeadExample objects; got {type(example).__name__}.")
    inputs = _inputs(example.inputs)
    given = Given(inputs)
    mask, length = given.mask, given.ids.shape[1]
    if not anatomy.placeholder_ids:
        raise SaliencyError(f"{anatomy.family!r} has no vision or audio tokens; grounding heads look at pictures or sounds.")
    pictures = _pictures(inputs, anatomy)
    media = torch.cat([span.positions for span in pictures]) if pictures else torch.zeros(0, dtype=torch.long)
    if not len(media):
        raise SaliencyError(f"its prompt has no {' or '.join(anatomy.placeholder_ids)} token; build it with the model's processor.")
    real = torch.ones(1, length, dtype=torch.bool) if mask is None else real_tokens(mask, length)
    statement, marked = _span(example.span, pictures, real, anatomy)
    outside = marked.clone()
    outside[media] = False
    if not marked.any() or outside.any() or marked[media].all():
        raise SaliencyError(
            f"its span marks {int(marked.sum())} tokens, {int(outside.sum())} of them outside the {len(media)} vision or audio "
            "tokens; it must mark some of these and not all."
        )
    query = _query(example.query, real[0], int(media.max()))
    return Row(inputs, query, _answer(example.answer, anatomy), statement, media, marked[media], _grids(pictures))


def _inputs(given: Mapping[str, Any]) -> dict[str, Tensor]:
    inputs = {name: value for name, value in given.items() if value is not None}
    wrong = [name for name, value in inputs.items() if not isinstance(value, Tensor)]
    ids, name = Given(inputs).ids, name_of("ids")
    if wrong or ids is None or ids.ndim != 2 or ids.shape[0] != 1:
        got = f"{wrong} are not tensors" if wrong else f"no {name}" if ids is None else f"{name} of shape {tuple(ids.shape)}"
        raise ConfigError(f"inputs are tensors of one row, with {name} of shape (1, tokens); got {got}.")
    return inputs


def _pictures(inputs: Mapping[str, Tensor], anatomy: Anatomy) -> tuple[Span, ...]:
    """Where each picture or sound lies; one per run of placeholder tokens where the inputs do not tell more."""
    given = Given(inputs)
    ids = given.ids.cpu()
    try:
        layouts = read_layouts(given, {}, anatomy, whole=False)
    except SaliencyError:  # a tower whose geometry is not known
        layouts = {}
    return find_spans(ids, anatomy.placeholder_ids, layouts) if layouts else tuple(_runs(ids[0], anatomy.placeholder_ids))


def _grids(pictures: Sequence[Span]) -> tuple[tuple[int, int, int], ...] | None:
    """Frames, height and width of each, a sound as one line; None where the tokens of one do not form a grid."""
    grids = []
    for span in pictures:
        layout = span.layout
        if span.modality == "audio":
            grids.append((1, 1, len(span.positions)))
        elif layout.grid is not None and math.prod(layout.grid) == len(span.positions):
            grids.append(layout.grid)
        else:
            return None
    return tuple(grids)


def _runs(ids: Tensor, placeholder_ids: Mapping[str, int]) -> Iterator[Span]:
    for modality, token in placeholder_ids.items():
        positions = (ids == token).nonzero().flatten().tolist()
        for index, (_, run) in enumerate(itertools.groupby(enumerate(positions), lambda pair: pair[1] - pair[0])):
            own = torch.tensor([position for _, position in run])
            yield Span(modality, 0, index, own, Layout(cells=torch.full((len(own), 4), torch.nan)))


def _span(span: Any, pictures: Sequence[Span], real: Tensor, anatomy: Anatomy) -> tuple[Saliency, Tensor]:
    """What steers towards a span, and the tokens `(tokens,)` that it marks."""
    length = real.shape[1]
    if isinstance(span, Saliency):
        statement = span if span.tokens is None else Saliency.from_tokens(_padded(span.tokens, length))
        found = scores_from_user(
            statement, pictures, real=real.cpu(), first_position=0, temporal_patch_size=anatomy.temporal_patch_size
        )
        scores = found.values[0]
        return statement, (scores > 0) & (scores >= _COVERED * scores.max())
    if not isinstance(span, Tensor) or span.dtype != torch.bool or span.ndim != 1:
        raise SaliencyError(
            "a span is a bool tensor over the prompt's tokens, of shape (tokens,), or a Saliency such as "
            f"Saliency.from_boxes(box, image.size); got {span!r}."
        )
    marked = _padded(span[None].cpu(), length)[0]
    regular = all(own.layout.cells is None for own in pictures)
    return (_paint(marked, pictures, anatomy) if regular else Saliency.from_tokens(marked)), marked


def _padded(scores: Tensor, length: int) -> Tensor:
    if scores.shape[1] > length:
        raise SaliencyError(f"its span covers {scores.shape[1]} tokens; the prompt has {length}.")
    return F.pad(scores, (0, length - scores.shape[1]))


def _paint(marked: Tensor, pictures: Sequence[Span], anatomy: Anatomy) -> Saliency:
    """Marked tokens as regions of their pictures, so that saliency is scaled, and mass kept, within each picture."""
    statement = Saliency()
    for span in pictures:
        for frame, own in enumerate(marked[span.positions].view(span.layout.grid or (1, 1, -1))):
            if not own.any():
                continue
            if span.modality == MODALITIES[0]:
                statement += Saliency.from_mask(own, image=span.index)
            else:
                step = anatomy.temporal_patch_size
                statement += Saliency.from_mask(own, video=span.index, frames=(frame * step, (frame + 1) * step))
    return statement


def _query(query: int, real: Tensor, last_media: int) -> int:
    length = len(real)
    if not -length <= query < length or not real[query]:
        raise ConfigError(f"query={query} is not one of the prompt's {length} tokens, or is padding.")
    position = query % length
    if position < last_media:
        raise ConfigError(f"query={position} comes before the last vision or audio token, {last_media}, and cannot attend to it.")
    return position


def _answer(answer: int | None, anatomy: Anatomy) -> int | None:
    size = setting(text_settings(anatomy.root), "words")
    if answer is not None and not 0 <= answer < size:
        raise ConfigError(f"answer={answer} is not a token id; the vocabulary has {size}, 0 to {size - 1}.")
    return answer
