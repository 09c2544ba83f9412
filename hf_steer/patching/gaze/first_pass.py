"""A first pass of the decoder over a prompt, unsteered, whose attention or gradient becomes the saliency of the real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_steer.attention import AttentionCall, SteeredCall, logits_in_chunks
from hf_steer.config.options import own_options
from hf_steer.errors import SaliencyError
from hf_steer.ground.arguments import Given, with_changes
from hf_steer.ground.caches import copy_of
from hf_steer.patching.gaze.prompt import Prompt
from hf_steer.patching.planned import Plan
from hf_steer.patching.scopes import STEERING, Enough
from hf_steer.registry import SOURCES
from hf_steer.saliency import Sight


def look_at_prompt(
    plan: Plan, prompt: Prompt, given: Given, *, rows: int, past: int, prompt_end: int | None
) -> Tensor:
    """Raw scores of the tokens of this pass, by the configured source.

    Args:
        plan: with a source that reads the prompt.
        prompt: what is new.
        given: the decoder's arguments.
        rows: of this pass: the prompt's, repeated for beams.
        past: keys in the cache before it.
        prompt_end: key position after the prompt, inside `generate`; drafted tokens may follow it.

    Returns:
        `(batch, tokens)` float32.

    Raises:
        SaliencyError: a prompt that comes in pieces, or whose tokens are not known.
    """
    anatomy, saliency = plan.anatomy, plan.config.attention.saliency  # type: ignore[union-attr]
    embeds, ids = given.embeds, prompt.ids
    embeds = anatomy.root.get_input_embeddings()(given.ids) if embeds is None else embeds
    tokens, copies = embeds.shape[1], rows // prompt.shape[0]
    if any(int(span.positions[-1]) >= past + tokens for span in prompt.spans):
        raise SaliencyError(f"source {saliency.source!r} needs the whole prompt in one pass; leave out prefill_chunk_size.")
    if ids is None:
        raise SaliencyError(f"source {saliency.source!r} needs input_ids to tell pictures and sounds from text.")
    end = past + tokens if prompt_end is None else prompt_end
    asked = ids[:, -(end - past) :].to(embeds.device) if end > past else ids[:, :0]
    real = torch.ones_like(asked, dtype=torch.bool)
    if prompt.real is not None:
        real = prompt.real[:, past:end].to(embeds.device)
    there = torch.arange(tokens, device=embeds.device) < end - past
    real, asked = (F.pad(own, (0, tokens - own.shape[1])).repeat_interleave(copies, 0) for own in (real, asked))
    placeholder = torch.isin(asked, torch.tensor(list(anatomy.placeholder_ids.values()), device=embeds.device))
    later = real.flip(1).cumsum(1).flip(1)  # how many real tokens come from here on
    last = (real & (later <= (saliency.last_tokens or 1))) & there
    sight = Sight(
        embeds=embeds.detach(),
        text=real & ~placeholder,
        attend=lambda: attend_first(anatomy.decoder, given, plan.readers, last),
        slope=lambda: slope_first(
            anatomy.decoder, anatomy.root.get_output_embeddings(), given, embeds,
            (real & (later == 1)).float().argmax(1), saliency.answer_token,
        ),
    )  # fmt: skip
    row = SOURCES[str(saliency.source)]
    with torch.no_grad():
        return row.prompt(sight, **own_options(saliency))[::copies].float()  # type: ignore[misc]


@dataclass
class HeadReader:
    """Collects the attention that chosen heads pay to each key from chosen queries.

    Attributes:
        heads: layer -> query heads.
        queries: `(rows, queries)` bool: which queries look.
        received: `(rows, keys)`: sum over heads, mean over queries, of their attention.
    """

    heads: Mapping[int, tuple[int, ...]]
    queries: Tensor
    received: Tensor | None = None
    seen: set[int] = field(default_factory=set)

    def __call__(self, call: AttentionCall) -> None:
        if call.layer not in self.heads:  # steered, but not asked
            return
        looking = self.queries.to(call.query.device)
        first = int(looking.any(0).float().argmax())
        total = torch.zeros(looking.shape[0], call.key.shape[2], device=call.query.device)
        for chunk, logits, _ in logits_in_chunks(call, queries=slice(first, None)):
            weights = torch.softmax(logits[:, list(self.heads[call.layer])], -1).sum(1)
            total += (weights * looking[:, chunk, None]).sum(1)
        total /= looking.sum(1, keepdim=True).clamp(min=1)
        self.received = total if self.received is None else self.received + total.to(self.received.device)
        self.seen.add(call.layer)
        if self.seen == set(self.heads):
            raise Enough


def attend_first(
    decoder: nn.Module, given: Given, heads: Mapping[int, tuple[int, ...]], queries: Tensor
) -> Tensor:
    """Mean attention that the heads pay to each token of this pass, from the chosen queries.

    Args:
        decoder: whose layers of these heads carry our attention function.
        given: its arguments; neither they nor the cache among them are changed.
        heads: layer -> query heads.
        queries: `(rows, tokens)` bool.

    Returns:
        `(rows, tokens)` float32, at least 0.
    """
    reader = HeadReader(heads, queries)
    with torch.no_grad(), suppress(Enough):
        decoder(**_without_cache(decoder, given), **{STEERING: SteeredCall(read=reader)})
    if reader.received is None:
        raise SaliencyError("the first pass read no head; give source_heads in layers that this model has.")
    return reader.received[:, -queries.shape[1] :] / sum(map(len, heads.values()))


def slope_first(
    decoder: nn.Module, head: nn.Module, given: Given, embeds: Tensor, last: Tensor, answer: int | None
) -> Tensor:
    """Gradient of the answer's logit with respect to what the decoder gets.

    Args:
        decoder: the language model.
        head: from its last hidden state to logits.
        given: the decoder's arguments.
        embeds: `(rows, tokens, features)`.
        last: `(rows,)` the query that the answer comes out of.
        answer: token; each row's likeliest when None.

    Returns:
        `(rows, tokens, features)`.

    Raises:
        SaliencyError: an answer outside the vocabulary.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = embeds.detach().clone().requires_grad_()
        arguments = Given({name: _plain(value) for name, value in _without_cache(decoder, given).items()}, given.own)
        hidden = decoder(**with_changes(decoder, arguments, ids=None, embeds=leaf), **{STEERING: SteeredCall()})[0]
        logits = head(hidden[torch.arange(len(hidden), device=hidden.device), _plain(last).to(hidden.device)])
        if answer is not None and not 0 <= answer < logits.shape[-1]:
            raise SaliencyError(f"answer_token={answer} is not in the vocabulary of {logits.shape[-1]} tokens.")
        chosen = logits.argmax(-1) if answer is None else torch.full((len(logits),), answer, device=logits.device)
        (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), leaf)
    return gradient.detach()


def _without_cache(decoder: nn.Module, given: Given) -> dict[str, Any]:
    """The decoder's arguments, for a pass that leaves no trace: without a cache, or on a copy of one that holds something."""
    own = Given({name: value for name, value in given.named.items() if name != STEERING}, given.own)
    if not int(own.past):
        mask = _cut(own.mask, own.count_tokens())
        return with_changes(decoder, own, cache=None, keeps_cache=False, mask=mask)
    return with_changes(decoder, own, cache=copy_of(own.cache), keeps_cache=True)


def _cut(mask: Any, tokens: int) -> Any:
    """A static cache's masks cover more keys than there are tokens."""
    cut: Callable[[Any], Any] = lambda own: own[..., :tokens] if isinstance(own, Tensor) and own.ndim == 4 else own  # noqa: E731
    return {name: cut(own) for name, own in mask.items()} if isinstance(mask, dict) else cut(mask)


def _plain(value: Any) -> Any:
    """Tensors that were made in inference mode cannot take part in a backward pass; their copies can."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value
