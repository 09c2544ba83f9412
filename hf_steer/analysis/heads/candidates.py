"""Which heads are worth to be steered at all, and with what: the first of two stages, one pass for hundreds of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_steer.analysis.heads.examples import Row
from hf_steer.analysis.heads.selection import Attends, Head
from hf_steer.config import SaliencyConfig
from hf_steer.errors import PatchError
from hf_steer.ground.parts import Anatomy
from hf_steer.patching import anatomy_of, get_steer_status

STRENGTH = 4.0
"""λ while heads are compared: a token of the span gets e^4, 55 times the odds that it had, against the whole prompt."""
STRENGTH_INSIDE = 32.0
"""λ where pictures keep their mass, so that text keeps its share however hard a head is turned: it looks at the span alone."""
FEW = 64
"""Heads that are all steered; in a model of more, those that attention singles out."""
FEWEST = 24
PER_CHOSEN = 3
"""Candidates at least, and for each head that is to be chosen."""


def attending(model: Any, attends: Attends) -> Anatomy:
    """Where a model's heads are: those that look at the prompt, or those that look at what an encoder hands on.

    Raises:
        PatchError: it has none of them, or is patched to steer the others.
    """
    anatomy = anatomy_of(model)
    if get_steer_status(model).patched and anatomy.attends != attends:
        raise PatchError(
            f"this model is patched to steer attends={anatomy.attends!r}, and heads of attends={attends!r} are asked for. Unpatch "
            "it, which leaves the patching to this call."
        )
    if attends == anatomy.attends:
        return anatomy
    if not anatomy.crosses:
        raise PatchError(f"{anatomy.family!r} has no heads that look at what an encoder hands on; leave attends at 'self'.")
    return anatomy.across()


def measuring_saliency(rows: Sequence[Row]) -> SaliencyConfig:
    """How spans are scaled while heads are compared: not at all, so that λ means the same for spans of any size.

    A picture's mass is kept, where all of the spans are drawn into pictures or sounds: heads then differ in where in it they look.
    """
    return SaliencyConfig(source=None, normalize="none", preserve_mass=_drawn(rows))


def measuring_strength(saliency: SaliencyConfig, rows: Sequence[Row]) -> float:
    """How hard heads are steered while they are compared, where that is not said."""
    kept = _drawn(rows) if saliency.preserve_mass is None else saliency.preserve_mass
    return STRENGTH_INSIDE if kept else STRENGTH


def _drawn(rows: Sequence[Row]) -> bool:
    """Whether all spans lie in pictures or sounds, which keep their mass where a configuration leaves that open."""
    return all(row.statement.tokens is None for row in rows)


def count_candidates(shape: tuple[int, int], count: int) -> int:
    """How many heads of a model are steered, where that is not said."""
    heads = shape[0] * shape[1]
    return heads if heads <= FEW else min(heads, max(FEWEST, PER_CHOSEN * count))


def best_candidates(scores: Mapping[str, Tensor], count: int) -> list[Head]:
    """The heads of steepest slope, where answers gave one, else those that attend most selectively to the span.

    Args:
        scores: of one pass, `(layers, heads)` each.
        count: of candidates.
    """
    table = scores.get("slope", scores["selectivity"])
    order = table.flatten().argsort(descending=True, stable=True)[:count].tolist()
    return [(place // table.shape[1], place % table.shape[1]) for place in order]
