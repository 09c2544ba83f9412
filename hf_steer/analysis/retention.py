"""How far steering moves what the model says next: KL(unsteered ‖ steered) along the unsteered model's own greedy continuation.

It is measured on the path that users take: the steered model's `generate` is made to say the unsteered continuation, and its raw
logits are the steered distributions after the same words. Caches, chunked prefill, gates and padding are as in any `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from hf_steer.analysis.distributions import kl_nats
from hf_steer.analysis.prompts import Batch, Inputs, as_batches
from hf_steer.config.checks import check_count
from hf_steer.errors import ConfigError
from hf_steer.ground.arguments import Given
from hf_steer.ground.settings import end_tokens
from hf_steer.patching import anatomy_of, disable_steering
from hf_steer.patching.scopes import steering_of
from hf_steer.saliency import Saliency

_OURS = (
    "do_sample", "logits_processor", "max_new_tokens", "num_beams", "num_return_sequences", "output_logits",
    "return_dict_in_generate", "stop_strings", "stopping_criteria", "streamer",
)  # fmt: skip
"""Arguments of `generate` that the measurement sets itself, or that would end rows where it could not see it."""


@dataclass(frozen=True, eq=False)
class Continuation:
    """What a model says greedily after the prompts of one batch, on the CPU.

    Attributes:
        tokens: `(batch, steps)`; padding after a row has ended.
        real: `(batch, steps)` bool, True up to and including the token that ends a row.
        logits: per step, `(batch, vocabulary)` float32, before any processing; empty when they were not asked for.
    """

    tokens: Tensor
    real: Tensor
    logits: tuple[Tensor, ...]

    def rows(self) -> list[list[int]]:
        """Tokens of each row, without what comes after its end."""
        return [row[keep].tolist() for row, keep in zip(self.tokens, self.real, strict=True)]


@dataclass(frozen=True, eq=False)
class Retention:
    """KL(unsteered ‖ steered) of the next token, in nats; the smaller, the more of the model's own words is retained.

    Attributes:
        kl_nats: mean of `per_row`: each prompt counts the same, however long its continuation is.
        per_row: mean over each row's steps.
        per_step: `(rows, steps)` float32, NaN after a row's end.
    """

    kl_nats: float
    per_row: tuple[float, ...]
    per_step: Tensor


def measure_retention(
    model: Any,
    inputs: Inputs | Sequence[tuple[Inputs, Saliency | None]],
    *,
    saliency: Saliency | None = None,
    new_tokens: int = 32,
    generate_kwargs: Mapping[str, Any] | None = None,
) -> Retention:
    """Compare the steered model's next-token distributions with the unsteered model's.

    The unsteered logits are kept on the CPU meanwhile: rows · new_tokens · vocabulary · 4 bytes.

    Args:
        model: a patched model in eval mode.
        inputs: of `generate`, padded on the left; or a list of pairs (inputs, Saliency or None).
        saliency: what is said about a single batch; None for what is in force already, or for the model's own eyes.
        new_tokens: how far to follow the continuation, at most; 1 is the prompt's next token alone.
        generate_kwargs: further arguments of `generate`, such as `prefill_chunk_size` or `cache_implementation`.

    Raises:
        PatchError: the model is not patched.
        ConfigError: no prompts, fewer than one new token, or an argument of `generate` that the measurement sets itself.
    """
    steering_of(model)
    batches = as_batches(inputs, saliency)
    return divergence(model, batches, continue_unsteered(model, batches, new_tokens, generate_kwargs), generate_kwargs)


def continue_unsteered(
    model: Any, batches: Sequence[Batch], new_tokens: int, generate_kwargs: Mapping[str, Any] | None = None
) -> list[Continuation]:
    """The greedy continuations of the unsteered model, to compare any number of steerings with."""
    with disable_steering(model):
        return [continue_greedily(model, batch, new_tokens, generate_kwargs, logits=True) for batch in batches]


def continue_greedily(
    model: Any, batch: Batch, new_tokens: int, generate_kwargs: Mapping[str, Any] | None = None, *, logits: bool = False
) -> Continuation:
    """What the model says about one batch as it is steered now."""
    check_count("new_tokens", new_tokens)
    given = dict(generate_kwargs or {})
    with batch.looking(model):
        out = _generate(model, batch, new_tokens, given)
    tokens = out.sequences[:, -len(out.logits) :].cpu()
    ends = end_tokens(anatomy_of(model).root, Given(given))
    ended = torch.zeros_like(tokens) if ends is None else torch.isin(tokens, torch.as_tensor(ends).cpu()).long()
    return Continuation(tokens, ended.cumsum(1) - ended == 0, tuple(step.cpu() for step in out.logits) if logits else ())


def divergence(
    model: Any,
    batches: Sequence[Batch],
    continuations: Sequence[Continuation],
    generate_kwargs: Mapping[str, Any] | None = None,
) -> Retention:
    """KL from the continuations' distributions to those of the model as it is steered now, after the same words."""
    tables = []
    for batch, said in zip(batches, continuations, strict=True):
        forced = LogitsProcessorList([_Say(said.tokens)])
        with batch.looking(model):
            out = _generate(model, batch, said.tokens.shape[1], dict(generate_kwargs or {}), logits_processor=forced)
        steps = [
            kl_nats(torch.log_softmax(before.to(after.device), -1), torch.log_softmax(after.float(), -1)).cpu()
            for before, after in zip(said.logits, out.logits, strict=True)
        ]
        tables.append(torch.stack(steps, 1).masked_fill(~said.real, math.nan))
    return summed_up(tables)


def summed_up(tables: Sequence[Tensor]) -> Retention:
    """The divergences of several batches, each `(rows, steps)` with NaN after a row's end."""
    longest = max(table.shape[1] for table in tables)
    per_step = torch.cat([F.pad(table, (0, longest - table.shape[1]), value=math.nan) for table in tables])
    per_row = per_step.nanmean(1)
    return Retention(float(per_row.mean()), tuple(per_row.tolist()), per_step)


def _generate(model: Any, batch: Batch, new_tokens: int, given: dict[str, Any], **extra: Any) -> Any:
    taken = sorted(set(given) & set(_OURS))
    if taken:
        raise ConfigError(
            f"generate_kwargs holds {', '.join(taken)}, which this measurement sets itself or cannot follow: it decodes greedily, "
            "one sequence per prompt, to the end-of-sequence token or new_tokens. Leave it out."
        )
    return model.generate(
        **batch.inputs, **given, **extra, max_new_tokens=new_tokens, do_sample=False, num_beams=1, num_return_sequences=1,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


class _Say(LogitsProcessor):
    """Lets `generate` choose nothing but given tokens, and thus follow another model's continuation."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self._start: int | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self._start is None:
            self._start = ids.shape[1]
        wanted = self._tokens[:, ids.shape[1] - self._start, None].to(scores.device)
        return torch.full_like(scores, -math.inf).scatter(1, wanted, 0.0)
