"""Passes of a `generate` that each begin by themselves: those of encoder-decoders, whose prompt the first of them brings."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hf_steer.errors import PatchError, SaliencyError
from hf_steer.ground.arguments import IGNORED_LABEL, Given
from hf_steer.patching.gaze.prompt import Prompt
from hf_steer.patching.passes import Pass
from hf_steer.patching.scopes import Source


def follow_source(current: Pass, given: Given) -> None:
    """Note where the prompt of the `generate` around a pass ends, which the first of its passes brings.

    Raises:
        PatchError: something is said, and a pass that is not the first neither goes on with a cache nor begins with the prompt.
        SaliencyError: token scores are said, and each pass brings the whole text again.
    """
    source = current.scope.source
    if source is None or given.source is None or torch.compiler.is_compiling():
        return
    end = int(given.past) + given.count_tokens()
    if source.prompt_end is None:
        source.prompt, source.prompt_end = given.ids, end
    elif current.state is None and current.statement is not None and not _begins_alike(source, given.ids):
        raise PatchError(
            "a forward pass inside generate is not one of generate's own: it neither goes on with its cache nor begins with its "
            "prompt. Where a logits processor or stopping criterion calls the model, do it inside disable_steering(model), or say "
            "where that call looks: model(..., saliency=...)."
        )
    current.prompt_end = source.prompt_end


def refuse_regrown(current: Pass, given: Given) -> None:
    """SaliencyError where token scores of a prompt meet the prompt and all that was generated since, for want of a cache."""
    end, statement = current.prompt_end, current.statement
    if end is None or given.cache is not None or statement is None or statement.tokens is None or given.count_tokens() <= end:
        return
    raise SaliencyError(
        f"the saliency speaks of {statement.tokens.shape[1]} tokens of the decoder's prompt, and without a cache each step brings "
        f"them anew with what was generated, {given.count_tokens()} by now. Leave use_cache at True."
    )


def with_own_labels(prompt: Prompt | None, current: Pass) -> Prompt | None:
    """The prompt with the labels that an encoder-decoder was called with: each is what comes out of the token at its place."""
    labels = None if current.given is None else current.given.labels
    if prompt is None or prompt.labelled is not None or not isinstance(labels, Tensor) or labels.shape != prompt.shape:
        return prompt
    return dataclasses.replace(prompt, labelled=labels != IGNORED_LABEL)


def unexpanded(given: Given, source: Source | None) -> Given:
    """The decoder's arguments with each row once, in a `generate` that repeats them for beams before the decoder runs."""
    rows = 0 if given.source is None else len(given.source)
    if source is None or rows <= source.rows or rows % source.rows:
        return given
    return given.every(rows // source.rows)


def _begins_alike(source: Source, ids: Tensor | None) -> bool:
    if source.prompt is None or ids is None:
        return True
    begun = ids[:, : source.prompt.shape[1]]
    return begun.shape == source.prompt.shape and torch.equal(begun, source.prompt.to(begun.device))
