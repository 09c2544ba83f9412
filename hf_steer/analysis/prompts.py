"""What an experiment runs on: steered heads, batches of prompts, what is said about each, which of their tokens are asked about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from hf_steer.errors import ConfigError, SaliencyError
from hf_steer.ground.arguments import Given, name_of
from hf_steer.ground.parts import Anatomy
from hf_steer.patching import get_steer_status, use_saliency, use_strength
from hf_steer.patching.gaze.prompt import real_tokens
from hf_steer.saliency import Saliency

if TYPE_CHECKING:
    from PIL import Image

Inputs: TypeAlias = Mapping[str, Any]
Span: TypeAlias = str | Tensor | None


@dataclass(frozen=True)
class Batch:
    """Prompts that go through the model together.

    Attributes:
        inputs: as the processor makes them.
        saliency: what is said about them; None for what is in force already, or for the model's own eyes.
    """

    inputs: Inputs
    saliency: Saliency | None

    @contextmanager
    def looking(self, model: Any) -> Iterator[None]:
        """Let what is said hold for the calls inside the block."""
        if self.saliency is None:
            yield
        else:
            with use_saliency(model, self.saliency):
                yield


def as_batches(inputs: Inputs | Sequence[tuple[Inputs, Saliency | None]], saliency: Saliency | None) -> tuple[Batch, ...]:
    """One batch or several, as the experiments take them.

    Args:
        inputs: of one batch, or a list of pairs of inputs and what is said about them.
        saliency: what is said about a single batch.

    Raises:
        ConfigError: an empty list, something else than pairs, or a saliency beside a list.
    """
    if isinstance(inputs, Mapping):
        return (Batch(inputs, saliency),)
    pairs = list(inputs)
    if not pairs:
        raise ConfigError("there are no prompts to measure on: inputs is an empty list. Give at least one (inputs, saliency).")
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Mapping) for pair in pairs):
        raise ConfigError(
            f"inputs must be what the processor makes, or a list of pairs (inputs, Saliency or None); got a list of "
            f"{type(pairs[0]).__name__}."
        )
    if saliency is not None:
        raise ConfigError("saliency= is for one batch; in a list, each batch brings its own: (inputs, saliency).")
    return tuple(Batch(*pair) for pair in pairs)


def steered_heads(model: Any) -> Mapping[int, tuple[int, ...]]:
    """Layer -> the query heads that a model's configuration steers.

    Raises:
        PatchError: the model is not patched, or its configuration steers none.
    """
    with use_strength(model, 0.0):  # which says what is wrong
        return get_steer_status(model).heads or {}


def own_tokens(inputs: Inputs) -> Given:
    """What the decoder reads: of an encoder-decoder, the tokens that come for its decoder."""
    given = Given(inputs)
    return given if given.decoder_ids is None and given.decoder_embeds is None else given.of_decoder()


def shape_of(inputs: Inputs) -> tuple[int, int]:
    """Rows and tokens of a prompt.

    Raises:
        SaliencyError: neither tokens nor embeddings, or a cache that two passes would both fill.
    """
    given = own_tokens(inputs)
    found = given.embeds if given.ids is None else given.ids
    if found is None or given.cache is not None:
        raise SaliencyError(
            f"a prompt to measure on needs {name_of('ids')} or {name_of('embeds')} and no {name_of('cache')}; got "
            f"{', '.join(sorted(inputs))}. Give the whole conversation as one prompt."
        )
    rows, tokens = found.shape[:2]
    return int(rows), int(tokens)


def real_of(inputs: Inputs) -> Tensor:
    """`(batch, tokens)` bool on the CPU, False for padding."""
    shape, mask = shape_of(inputs), own_tokens(inputs).mask
    return torch.ones(shape, dtype=torch.bool) if mask is None else real_tokens(mask, shape[1]).cpu()


def queries_of(inputs: Inputs, queries: Tensor | None) -> Tensor:
    """`(batch, tokens)` bool: the real tokens, or those of them that are asked for.

    Raises:
        SaliencyError: of another shape or dtype, or none of them is real.
    """
    real = real_of(inputs)
    chosen = real if queries is None else real & _marked("queries", queries, real)
    if not chosen.any():
        raise SaliencyError("no query is left to measure: all of them are padding or not marked in queries.")
    return chosen


def last_queries(inputs: Inputs) -> Tensor:
    """`(batch, tokens)` bool: the last real token of each row, out of which the first new token comes."""
    real = real_of(inputs)
    return real & (real.long().flip(1).cumsum(1).flip(1) == 1)


def span_of(anatomy: Anatomy, inputs: Inputs, span: Span) -> Tensor | None:
    """`(batch, tokens)` bool: the tokens whose share of attention is asked for.

    Args:
        anatomy: says which tokens stand for pictures and sounds.
        inputs: of the prompt.
        span: `"image"`, `"video"`, `"audio"`, a bool tensor `(batch, tokens)`, or None.

    Raises:
        SaliencyError: the family has no such tokens, or the prompt has none of them.
    """
    if span is None:
        return None
    if anatomy.attends == "cross":
        return _across(span)
    real = real_of(inputs)
    if isinstance(span, Tensor):
        marked, what = real & _marked("span", span, real), "marked in span"
    else:
        known = anatomy.placeholder_ids
        if span not in known:
            raise SaliencyError(
                f"span={span!r}: prompts of {anatomy.family!r} have no such tokens; they have {', '.join(known) or 'only text'}. "
                "Mark the tokens yourself with a bool tensor (batch, tokens), or leave the span out with span=None."
            )
        ids, name = Given(inputs).ids, name_of("ids")
        if ids is None:
            raise SaliencyError(f"span={span!r} is found in {name}, which are not there; mark the tokens with a bool tensor.")
        marked, what = real & (ids.cpu() == known[span]), f"{span} tokens (id {known[span]})"
    if not marked.any():
        raise SaliencyError(
            f"none of the prompt's {tuple(real.shape)} tokens are {what}, so no attention can go there. Put a picture or a sound "
            "into the prompt, mark other tokens with a bool tensor (batch, tokens), or leave the span out with span=None."
        )
    return marked


def _across(span: str | Tensor) -> Tensor:
    """Of what an encoder hands on."""
    if not isinstance(span, Tensor) or span.dtype != torch.bool or span.ndim != 2 or not span.any():
        raise SaliencyError(
            "of what an encoder hands on, a span is a bool tensor (batch, positions) that marks some of them; got "
            f"{span if isinstance(span, str) else type(span).__name__!r}."
        )
    return span.cpu()


def _marked(name: str, values: Tensor, real: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.dtype != torch.bool or values.shape != real.shape:
        got = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise SaliencyError(f"{name} must be a bool tensor {tuple(real.shape)}, the shape of {name_of('ids')}; got {got}.")
    return values.cpu()


def messages_for(image: Image.Image, question: str) -> list[dict[str, Any]]:
    """One user turn, as `processor.apply_chat_template` and `qwen_vl_utils.process_vision_info` take it."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
