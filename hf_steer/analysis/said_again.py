"""Divergence along a continuation in one pass over the prompt and all that was said after it.

What `generate` computes token by token, a model computes for many tokens at once. A statement about pictures or sounds means the
same for the longer prompt; scores of tokens speak of the prompt alone, so what was said goes through on the prompt's cache. It
holds where each query is steered alike: not with gates and phases, which depend on the step before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.analysis.distributions import kl_nats
from hf_steer.analysis.prompts import Batch
from hf_steer.analysis.retention import Continuation, Retention, divergence, summed_up
from hf_steer.ground.arguments import Given, named, spelling_in, with_changes
from hf_steer.ground.caches import made_caches
from hf_steer.ground.decoders import reads_encoder
from hf_steer.ground.outputs import logits_in
from hf_steer.patching import anatomy_of, disable_steering, get_steer_status
from hf_steer.patching.gaze.prompt import real_tokens
from hf_steer.patching.scopes import scope_of, steering_of


def said_again(
    model: Any,
    batches: Sequence[Batch],
    said: Sequence[Continuation],
    generate_kwargs: Mapping[str, Any] | None,
    *,
    noise_nats: float,
) -> Callable[[], Retention]:
    """What measures the divergence of the model as it is steered when it is called: by one pass, or as `divergence` does.

    By one pass, if without steering that gives what `generate` gave.

    Args:
        model: patched.
        batches: prompts.
        said: their unsteered continuations, with logits.
        generate_kwargs: of `generate`.
        noise_nats: mean KL per token between the two ways that is let pass.
    """

    def slowly() -> Retention:
        return divergence(model, batches, said, generate_kwargs)

    ways = [_way(model, batch) for batch in batches]
    if generate_kwargs or None in ways or not _steers_alike(model):
        return slowly

    def logits() -> list[Tensor]:
        return [way(model, batch, own) for way, batch, own in zip(ways, batches, said, strict=True) if way is not None]

    with disable_steering(model):
        plain = logits()
    spoken = [torch.stack(own.logits, 1) for own in said]
    if not _compared(spoken, plain, said).kl_nats <= noise_nats:
        return slowly

    def at_once() -> Retention:
        return _compared(plain, logits(), said)

    return at_once


@torch.no_grad()
def after_the_cache(model: Any, batch: Batch, said: Continuation) -> Tensor:
    """`(rows, steps, vocabulary)` on the CPU: logits after the prompt, and on its cache after each token that was said."""
    root, given = anatomy_of(model).root, Given(batch.inputs)
    with batch.looking(model):
        out = model(**with_changes(root, given, keeps_cache=True, **_last(root, 1)))
        first = logits_in(out)[:, -1:].cpu()
        if said.tokens.shape[1] == 1:
            return first
        tokens, mask = _longer(given, said)
        more = Given(named(ids=tokens, mask=mask))
        rest = logits_in(model(**with_changes(root, more, cache=made_caches(out)[0], keeps_cache=True)))
    return torch.cat([first, rest.cpu()], 1)


@torch.no_grad()
def in_one_prompt(model: Any, batch: Batch, said: Continuation) -> Tensor:
    """The same of a prompt that is longer by what was said."""
    root, given = anatomy_of(model).root, Given(batch.inputs)
    tokens, mask = _longer(given, said)
    changes: dict[str, Any] = {"ids": torch.cat([given.ids, tokens], 1), "mask": mask, "keeps_cache": False}
    if given.token_kinds is not None:
        changes["token_kinds"] = F.pad(given.token_kinds, (0, tokens.shape[1]))
    steps = said.tokens.shape[1]
    with batch.looking(model):
        return logits_in(model(**with_changes(root, given, **changes, **_last(root, steps))))[:, -steps:].cpu()


Way = Callable[[Any, Batch, Continuation], Tensor]


def _last(root: Any, count: int) -> dict[str, int]:
    return {} if spelling_in(root, "logits_kept") is None else {"logits_kept": count}


def _longer(given: Given, said: Continuation) -> tuple[Tensor, Tensor]:
    """What was said but its last token, after which nothing is asked; and the mask of prompt and that."""
    tokens = said.tokens[:, :-1].to(given.ids.device)
    real = torch.ones_like(given.ids) if given.mask is None else real_tokens(given.mask, given.ids.shape[1]).long()
    return tokens, F.pad(real, (0, tokens.shape[1]), value=1)


def _way(model: Any, batch: Batch) -> Way | None:
    """How a batch can go through at once; None where it cannot."""
    given, steering = Given(batch.inputs), steering_of(model)
    mask = given.mask
    plain = isinstance(given.ids, Tensor) and given.embeds is None and (mask is None or mask.ndim == 2) and given.cache is None
    statement = scope_of(steering).saliency if batch.saliency is None else batch.saliency
    attention = steering.plan.config.attention
    if not plain or attention is None:
        return None
    if statement is None:
        return None if attention.saliency.reads_prompt else in_one_prompt
    if statement.tokens is None:
        return in_one_prompt
    return None if given.perceives else after_the_cache


def _steers_alike(model: Any) -> bool:
    """Whether each query is steered alike, whatever came before it."""
    config = get_steer_status(model).config
    attention = None if config is None else config.attention
    anatomy = anatomy_of(model)
    return (
        attention is not None
        and attention.phase_factors == (1.0, 1.0, 1.0)
        and attention.gate is None
        and attention.attends == "self"
        and not reads_encoder(anatomy.root)
    )


def _compared(before: Sequence[Tensor], after: Sequence[Tensor], said: Sequence[Continuation]) -> Retention:
    tables = []
    for one, other, own in zip(before, after, said, strict=True):
        assert other is not None
        steps = kl_nats(torch.log_softmax(one.float(), -1), torch.log_softmax(other.float(), -1))
        tables.append(steps.masked_fill(~own.real, math.nan))
    return summed_up(tables)
