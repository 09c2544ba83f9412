"""Ways to run a tiny model of which each must come out steered as the oracle says: what `hf_steer.testing.coverage` compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_steer.ground.arguments import named
from hf_steer.ground.caches import made_caches
from hf_steer.ground.outputs import logits_in
from hf_steer.testing.report import CannotShow
from hf_steer.testing.zoo.inputs import TOKENS, Batch
from hf_steer.testing.zoo.prompts import beginning, mask_of, next_word

FIRST = 7
"""Tokens of the prompt of which the rest follows one by one."""
NEW_TOKENS, BEAMS = 3, 2
Run = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Way:
    """One of them.

    Attributes:
        run: from a model and a batch to numbers that steering changes.
        prompt: tokens that the user speaks of.
        padded: whether the second row is shorter, and padded on the left.
        also: another run that must give the same as far as the model itself does.
        instead: what is run where the model itself cannot be run the first way.
    """

    run: Run
    prompt: int = TOKENS
    padded: bool = False
    also: Run | None = None
    instead: Run | None = None


def whole(model: Any, batch: Batch) -> Tensor:
    """Logits of the words of one pass."""
    logits = logits_in(model(**batch))
    if not logits.isfinite().all():
        raise CannotShow("its logits are not finite")
    return logits


def real(model: Any, batch: Batch) -> Tensor:
    """The same, of words that are not padding."""
    logits, mask = whole(model, batch), mask_of(model, batch)
    return logits[mask.repeat_interleave(logits.shape[0] // mask.shape[0], 0)]


def one_by_one(model: Any, batch: Batch) -> Tensor:
    """A beginning, then word for word on the cache: logits of the last word of each pass."""
    out = model(**beginning(model, batch, FIRST), **named(keeps_cache=True))
    seen = [logits_in(out)[:, -1]]
    for position in range(FIRST, TOKENS):
        caches = made_caches(out)
        if not caches:
            raise CannotShow("it gives back no cache of keys")
        out = model(**next_word(model, batch, position, out, caches[0]), **named(keeps_cache=True))
        seen.append(logits_in(out)[:, -1])
    return torch.stack(seen, 1)


def at_once(model: Any, batch: Batch) -> Tensor:
    """The same logits out of one pass."""
    return whole(model, beginning(model, batch, TOKENS))[:, FIRST - 1 :]


def greedily(model: Any, batch: Batch) -> Tensor:
    """A beginning, and what `generate` puts after it: logits of each new word."""
    out = _generate(model, beginning(model, batch, FIRST), output_logits=True)
    return torch.stack(out.logits, 1)


def beams(model: Any, batch: Batch) -> Tensor:
    """How likely both beams of each row are."""
    out = _generate(model, batch, num_beams=BEAMS, num_return_sequences=BEAMS, output_scores=True)
    return out.sequences_scores  # type: ignore[no-any-return]


def static(model: Any, batch: Batch) -> Tensor:
    """Logits of each new token, out of a static cache."""
    if not getattr(model, "_can_compile_fullgraph", False):
        raise CannotShow("it does not take a static cache")
    out = _generate(model, batch, cache_implementation="static", disable_compile=True, output_logits=True)
    return torch.stack(out.logits, 1)


def _generate(model: Any, batch: Batch, **options: Any) -> Any:
    if not model.can_generate():
        raise CannotShow("it does not generate")
    return model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **options)


WAYS: dict[str, Way] = {
    "prefill": Way(whole),
    "decode": Way(one_by_one, prompt=FIRST, also=at_once, instead=greedily),
    "padded": Way(real, padded=True),
    "beams": Way(beams),
    "static": Way(static),
}
