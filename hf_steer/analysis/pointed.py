"""What is pointed at in a prompt: the tokens that what is said scores highest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_steer.analysis.metrics import run_with
from hf_steer.analysis.prompts import Batch, Span, shape_of
from hf_steer.attention import AttentionCall
from hf_steer.ground.arguments import Given
from hf_steer.patching import anatomy_of, use_strength
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
    scores = scores_in_force(model, batch, layer)
    marked = covered(scores)
    return marked if marked.any() else None


def covered(scores: Tensor) -> Tensor:
    """`(batch, tokens)` bool: what scores above 0, and at least half as high as any in its row."""
    marked: Tensor = (scores > 0) & (scores >= COVERED * scores.amax(1, keepdim=True))
    return marked


def scores_in_force(model: Any, batch: Batch, layer: int) -> Tensor:
    """`(batch, tokens)` float32: the normalised saliency of a prompt, as the bias carries it; 0 where nothing is said.

    Of what an encoder hands on, where that is what is steered: one score for each of its positions.

    Args:
        model: patched.
        batch: of prompts.
        layer: a steered one, to look at.
    """
    found: list[Tensor] = []

    def read(call: AttentionCall) -> None:
        key = torch.zeros(call.key.shape[0], call.key.shape[2], 1) if call.bias is None else call.bias.key
        found.append(key[..., 0].float().cpu())

    with use_strength(model, 1.0), batch.looking(model):
        run_with(model, batch.inputs, read, [layer])
    return found[0] if found else torch.zeros(shape_of(batch.inputs))


def _placeholders(model: Any, batch: Batch) -> Span:
    ids = Given(batch.inputs).ids
    known = anatomy_of(model).placeholder_ids
    return next((name for name, token in known.items() if ids is not None and bool((ids == token).any())), None)
