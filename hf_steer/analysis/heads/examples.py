"""What heads are looked for with: prompts, where to look in them, and what to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_steer.analysis.heads.targets import find_target, prompt_in
from hf_steer.errors import ConfigError, SaliencyError
from hf_steer.ground.arguments import Given, name_of, named
from hf_steer.ground.decoders import reads_encoder
from hf_steer.ground.parts import Anatomy
from hf_steer.ground.settings import setting, text_settings
from hf_steer.saliency import Saliency


@dataclass(frozen=True, eq=False)
class HeadExample:
    """One prompt, one place to look.

    Attributes:
        inputs: the model's inputs, tensors of one row, as the processor makes them. To measure the answer's attention, the
            tokens that come before the answer (a thought, say) are appended already.
        span: where a grounding head looks: a bool tensor over the prompt's tokens (later tokens are no part of it), or a
            `Saliency` of row 0, such as `Saliency.from_boxes(box, image.size)` or `Saliency.from_text("words", tokenizer, ids)`.
            In a prompt with pictures or sounds it lies on their tokens. Of a decoder that reads an encoder by cross-attention
            (`attends="cross"`): over the encoder's positions, or `Saliency.from_seconds(...)`.
        answer: id of the token that is right after the query; None to go by attention alone.
        query: position of the token whose attention is measured, and out of which the answer comes; negative counts from the last.
        among: bool over the same positions as the span: those that it is compared with, and a part of which it is. None for the
            tokens of the pictures or sounds; in a text for all before the answer but the first, which attention rests on; across,
            for all positions.
    """

    inputs: Mapping[str, Tensor]
    span: Tensor | Saliency
    answer: int | None = None
    query: int = -1
    among: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """An example, checked and resolved.

    Attributes:
        inputs: tensors of one row.
        query: its position.
        answer: id of the right token, if there is one.
        statement: what steers towards the span.
        media: `(places,)` positions that the span is compared with: of vision or audio tokens, picture by picture, or of text.
        target: `(places,)` bool: which of them are in the span.
        grids: frames, height and width of each picture or sound, in the order of `media`; None where that is not known.
        padded: names of inputs to which further tokens may be added on the right, where they no longer matter.
        length: tokens of the prompt.
    """

    inputs: dict[str, Tensor]
    query: int
    answer: int | None
    statement: Saliency
    media: Tensor
    target: Tensor
    grids: tuple[tuple[int, int, int], ...] | None
    padded: tuple[str, ...]
    length: int


def resolve_examples(examples: Sequence[HeadExample], anatomy: Anatomy) -> list[Row]:
    """Check every example against the model; each fault names the example.

    Args:
        examples: to be checked.
        anatomy: of the model; with `attends="cross"`, of what it reads from its encoder.

    Raises:
        ConfigError: not a HeadExample, inputs that are not one row of tensors, a query or answer that is not there.
        SaliencyError: no vision or audio token, or a span that is empty, outside the picture or all of it.
    """
    rows = []
    for number, example in enumerate(examples):
        try:
            rows.append(_resolve(example, anatomy))
        except (ConfigError, SaliencyError) as error:
            raise type(error)(f"example {number}: {error}") from error
    return rows


def _resolve(example: HeadExample, anatomy: Anatomy) -> Row:
    if not isinstance(example, HeadExample):
        raise ConfigError(f"examples are HeadExample objects; got {type(example).__name__}.")
    inputs = _inputs(example.inputs, anatomy)
    given = prompt_in(inputs, anatomy)
    target = find_target(inputs, example.span, example.among, example.query, anatomy)
    return Row(
        inputs, target.query, _answer(example.answer, anatomy), target.statement, target.places, target.marked[target.places],
        target.grids, _growing(inputs, anatomy), int(given.ids.shape[1]),
    )  # fmt: skip


def _growing(inputs: Mapping[str, Tensor], anatomy: Anatomy) -> tuple[str, ...]:
    """Names of what is as long as the prompt, where nothing else in the inputs is: tokens and their mask."""
    pair = reads_encoder(anatomy.root)
    ours = named(decoder_ids=0, decoder_mask=0) if pair else named(ids=0, mask=0)
    given = Given(inputs)
    others = set(inputs) - set(ours)
    if (not pair and (others or given.perceives)) or (given.mask is not None and given.mask.ndim != 2):
        return ()
    return tuple(ours)


def _inputs(given: Mapping[str, Any], anatomy: Anatomy) -> dict[str, Tensor]:
    inputs = {name: value for name, value in given.items() if value is not None}
    wrong = [name for name, value in inputs.items() if not isinstance(value, Tensor)]
    word = "decoder_ids" if reads_encoder(anatomy.root) else "ids"
    ids, name = getattr(Given(inputs), word), name_of(word)
    if wrong or ids is None or ids.ndim != 2 or ids.shape[0] != 1:
        got = f"{wrong} are not tensors" if wrong else f"no {name}" if ids is None else f"{name} of shape {tuple(ids.shape)}"
        raise ConfigError(f"inputs are tensors of one row, with {name} of shape (1, tokens); got {got}.")
    return inputs


def _answer(answer: int | None, anatomy: Anatomy) -> int | None:
    size = setting(text_settings(anatomy.root), "words")
    if answer is not None and not 0 <= answer < size:
        raise ConfigError(f"answer={answer} is not a token id; the vocabulary has {size}, 0 to {size - 1}.")
    return answer
