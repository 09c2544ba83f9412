"""What is pointed at in a prompt: the tokens that what is said scores highest."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_steer.analysis.prompts import Batch, Span
from hf_steer.ground.arguments import Given
from hf_steer.patching import anatomy_of
from hf_steer.patching.scopes import scope_of, steering_of

COVERED = 0.5
"""A token is pointed at when it scores at least this share of its row's highest score: a box rarely ends where tokens end."""


def pointed_at(model: Any, batch: Batch, layer: int) -> Span:
    """`(batch, tokens)` bool: the tokens that what is said scores at least half as high as any.

    Where nothing is said, the modality of the prompt's pictures or sounds, or None in a text.

    Args:
        model: patched.
        batch: of prompts.
        layer: a steered one, in which the scores are seen.
    """
    if (scope_of(steering_of(model)).saliency if batch.saliency is None else batch.saliency) is None:
        return _placeholders(model, batch)
    from hf_steer.analysis.target_mass import scores_in_force

    scores = scores_in_force(model, batch, layer)
    highest = scores.amax(1, keepdim=True)
    marked: Tensor = (scores > 0) & (scores >= COVERED * highest)
    return marked if marked.any() else None


def _placeholders(model: Any, batch: Batch) -> Span:
    ids = Given(batch.inputs).ids
    known = anatomy_of(model).placeholder_ids
    return next((name for name, token in known.items() if ids is not None and bool((ids == token).any())), None)
