"""Where an example's span lies: on the tokens of pictures and sounds, on text, or on what an encoder hands on."""

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
from hf_steer.ground.arguments import Given
from hf_steer.ground.attention_call import AttentionCall
from hf_steer.ground.decoders import reads_encoder
from hf_steer.ground.parts import Anatomy
from hf_steer.patching import probe_attention
from hf_steer.patching.gaze.prompt import real_tokens
from hf_steer.saliency import Saliency, find_spans, frames_of, read_layouts, scores_from_user
from hf_steer.values import MODALITIES, Layout, Span

COVERED = 0.5
"""A token belongs to a span when it scores at least this share of the highest score: a box rarely ends where tokens end."""
Grids = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Target:
    """A span, found.

    Attributes:
        statement: what steers towards it.
        places: `(places,)` positions that it is compared with.
        marked: `(positions,)` bool: which are in it.
        grids: frames, height and width of pictures and sounds, in the order of `places`; None where there are none or it is not
            known.
        query: position of the token that looks.
    """

    statement: Saliency
    places: Tensor
    marked: Tensor
    grids: Grids | None
    query: int


def prompt_in(inputs: Mapping[str, Tensor], anatomy: Anatomy) -> Given:
    """What the decoder reads of a call: its own tokens, also where a model's first ones are its encoder's."""
    given = Given(inputs)
    return given.of_decoder() if reads_encoder(anatomy.root) else given


def find_target(inputs: Mapping[str, Tensor], span: Any, among: Any, query: int, anatomy: Anatomy) -> Target:
    """Where a span lies.

    Args:
        inputs: of one row.
        span: a bool tensor, or a Saliency.
        among: positions that it is compared with; None for what that is by itself.
        query: of the token that looks; negative counts from the last.
        anatomy: of the model.

    Raises:
        ConfigError: no such query, or one that comes before what it is to look at.
        SaliencyError: a span that is empty, elsewhere, or all there is.
    """
    given = prompt_in(inputs, anatomy)
    mask, length = given.mask, given.ids.shape[1]
    real = (torch.ones(1, length, dtype=torch.bool) if mask is None else real_tokens(mask, length)).cpu()
    place = _query(query, real[0])
    if anatomy.attends == "cross":
        return _across(inputs, span, among, place, anatomy)
    pictures = _pictures(given, anatomy)
    statement, marked = _span(span, pictures, real, anatomy)
    grids: Grids | None = None
    if among is not None:
        places, what = _among(among, real[0]), "tokens of among"
    elif pictures:
        places, what, grids = torch.cat([own.positions for own in pictures]), "vision or audio tokens", _grids(pictures)
    else:
        places, what = real[0].nonzero().flatten()[1:], "tokens of its text after the first"
        places = places[places <= place]
    last = int(places.max()) if pictures and among is None else int(marked.nonzero().max()) if marked.any() else 0
    if place < last:
        raise ConfigError(f"query={place} comes before the last {'of its span' if not pictures else 'vision or audio token'}, "
                          f"{last}, and cannot attend to it.")  # fmt: skip
    _check(marked, places, what)
    return Target(statement, places, marked, grids, place)


def _across(inputs: Mapping[str, Tensor], span: Any, among: Any, query: int, anatomy: Anatomy) -> Target:
    """Over the positions that an encoder hands on."""
    count = positions_across(inputs, anatomy)
    step = anatomy.frame_seconds
    sound = () if step is None else (Span("audio", 0, 0, torch.arange(count), frames_of(count, step)),)
    every = torch.ones(1, count, dtype=torch.bool)
    statement, marked = _span(span, sound, every, anatomy, across=True)
    places = torch.arange(count) if among is None else _among(among, every[0])
    _check(marked, places, "positions that the encoder hands on")
    return Target(statement, places, marked, None, query)


def positions_across(inputs: Mapping[str, Tensor], anatomy: Anatomy) -> int:
    """How many positions the encoder hands on for these inputs, as the decoder's attention sees them in a plain pass."""
    keys: list[int] = []

    def count(call: AttentionCall) -> None:
        keys.append(call.key.shape[2])

    device = next(anatomy.root.parameters()).device
    with torch.no_grad(), probe_attention(anatomy.root, count, sites=anatomy.layers[:1]):
        anatomy.root(**{name: value.to(device) for name, value in inputs.items()})
    return keys[0]


def _check(marked: Tensor, places: Tensor, what: str) -> None:
    outside = marked.clone()
    outside[places] = False
    if not marked.any() or outside.any() or marked[places].all():
        raise SaliencyError(
            f"its span marks {int(marked.sum())} tokens, {int(outside.sum())} of them outside the {len(places)} {what}; it must "
            "mark some of these and not all. To compare it with others, name them with among=."
        )


def _among(among: Any, real: Tensor) -> Tensor:
    if not isinstance(among, Tensor) or among.dtype != torch.bool or among.ndim != 1 or len(among) > len(real):
        got = f"{among.dtype} of shape {tuple(among.shape)}" if isinstance(among, Tensor) else type(among).__name__
        raise SaliencyError(f"among is a bool tensor over the span's {len(real)} positions; got {got}.")
    return (F.pad(among.cpu(), (0, len(real) - len(among))) & real).nonzero().flatten()


def _pictures(given: Given, anatomy: Anatomy) -> tuple[Span, ...]:
    """Where each picture or sound lies; one per run of placeholder tokens where the inputs do not tell more."""
    if not anatomy.placeholder_ids:
        return ()
    ids = given.ids.cpu()
    try:
        layouts = read_layouts(given, {}, anatomy, whole=False)
    except SaliencyError:  # a tower whose geometry is not known
        layouts = {}
    return find_spans(ids, anatomy.placeholder_ids, layouts) if layouts else tuple(_runs(ids[0], anatomy.placeholder_ids))


def _grids(pictures: Sequence[Span]) -> Grids | None:
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


def _span(
    span: Any, pictures: Sequence[Span], real: Tensor, anatomy: Anatomy, *, across: bool = False
) -> tuple[Saliency, Tensor]:
    """What steers towards a span, and the tokens `(tokens,)` that it marks."""
    length = real.shape[1]
    if isinstance(span, Saliency):
        statement = span if span.tokens is None else Saliency.from_tokens(_padded(span.tokens, length))
        step = 1 if across else anatomy.temporal_patch_size
        found = scores_from_user(statement, pictures, real=real, first_position=0, temporal_patch_size=step)
        scores = found.values[0]
        return statement, (scores > 0) & (scores >= COVERED * scores.max())
    if not isinstance(span, Tensor) or span.dtype != torch.bool or span.ndim != 1:
        raise SaliencyError(
            "a span is a bool tensor over the prompt's tokens, of shape (tokens,), or a Saliency such as "
            f"Saliency.from_boxes(box, image.size); got {span!r}."
        )
    marked = _padded(span[None].cpu(), length)[0]
    regular = not across and bool(pictures) and all(own.layout.cells is None for own in pictures)
    inside = regular and not marked[~torch.isin(torch.arange(length), torch.cat([own.positions for own in pictures]))].any()
    return (_paint(marked, pictures, anatomy) if inside else Saliency.from_tokens(marked.float())), marked


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


def _query(query: int, real: Tensor) -> int:
    length = len(real)
    if not -length <= query < length or not real[query]:
        raise ConfigError(f"query={query} is not one of the prompt's {length} tokens, or is padding.")
    return query % length
