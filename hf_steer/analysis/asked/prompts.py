"""From the lines of an examples file to a model's inputs, what is said about them, and the answers that are right."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.analysis.asked.lines import Line, read_lines
from hf_steer.analysis.asked.wav import read_wav
from hf_steer.analysis.prompts import messages_for
from hf_steer.errors import FileError, SaliencyError
from hf_steer.ground.arguments import Given, named
from hf_steer.ground.decoders import reads_encoder
from hf_steer.ground.settings import generation_settings, setting
from hf_steer.saliency import Saliency, open_upright


@dataclass(frozen=True, eq=False)
class Asked:
    """One prompt, ready for the model.

    Attributes:
        inputs: of one row, up to where the answer begins.
        said: where to look.
        answer: what is right, in words; None where nobody says.
        answer_token: its first token that is more than white space.
        about: the line in short.
        among: `(positions,)` bool over what an encoder hands on, as far as the sound goes; None for all others.
    """

    inputs: dict[str, Tensor]
    said: Saliency
    answer: str | None
    answer_token: int | None
    about: str
    among: Tensor | None = None


@dataclass(frozen=True)
class Reader:
    """What makes inputs for one model.

    Attributes:
        processor: the model's processor or tokenizer.
        model: None where only its processor is at hand; a model that listens by cross-attention must be there.
    """

    processor: Any
    model: Any = None

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def crosses(self) -> bool:
        """Whether the model's decoder reads an encoder by cross-attention."""
        return self.model is not None and reads_encoder(self.model)

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """Token numbers of a text."""
        found: list[int] = Given(self.tokenizer(text, add_special_tokens=special)).ids
        return list(found)


def read_asked(path: str | os.PathLike[str], processor: Any, *, model: Any = None) -> list[Asked]:
    """Read an examples file and put its lines through a model's processor.

    Args:
        path: of the file; see `FORMS`.
        processor: the model's processor, or its tokenizer.
        model: for a decoder that reads an encoder by cross-attention, whose prompt begins as its settings say.

    Raises:
        FileError: a line that is none, or a picture or sound that cannot be read; the line is named.
        SaliencyError: something to look at that is not there.
    """
    return [ask(line, Reader(processor, model)) for line in read_lines(path)]


def ask(line: Line, reader: Reader) -> Asked:
    """One line as a prompt; its faults name it."""
    try:
        return _readers(reader)[line.form](line, reader)
    except (FileError, SaliencyError) as error:
        raise line.error(error) from error


def _readers(reader: Reader) -> Mapping[str, Callable[[Line, Reader], Asked]]:
    """Form of a line -> what reads it for this model."""
    heard = _transcribed if reader.crosses else _heard
    return MappingProxyType({"image": _seen, "audio": heard, "messages": _read, "prompt": _read})




def _read(line: Line, reader: Reader) -> Asked:
    """A text, or a conversation of texts."""
    values, tokenizer = line.values, reader.tokenizer
    templated = "messages" in values or bool(getattr(tokenizer, "chat_template", None))
    content = values["prompt"] if "prompt" in values else values["messages"][-1]["content"]
    text = content
    if templated:
        turns = values.get("messages") or [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    shown, text = text, text + values.get("thought", "")
    before = reader.ids(text, special=not templated)
    after = None
    if "answer" in values:
        after = reader.ids(text + values["answer"], special=not templated)
    ids, token = _begun(before, after, values, reader)
    scores = _looked(values, content, shown, ids, reader, special=not templated)
    own = torch.tensor([ids])
    return Asked(named(ids=own, mask=torch.ones_like(own)), Saliency.from_tokens(scores), values.get("answer"), token,
                 _short(values["look"]))  # fmt: skip


def _looked(
    values: Mapping[str, Any], content: str, text: str, ids: Sequence[int], reader: Reader, *, special: bool
) -> Tensor:
    """`(1, tokens)`: 1 where to look."""
    look = values["look"]
    parts = [look] if isinstance(look, str) or isinstance(look[0], int) else look
    scores = torch.zeros(1, len(ids))
    quoted = [part for part in parts if isinstance(part, str)]
    if quoted:
        prompt = reader.ids(text, special=special)  # a thought may quote the same words
        prompt = prompt if list(ids[: len(prompt)]) == prompt else list(ids)
        own = Saliency.from_text([quoted], reader.tokenizer, torch.tensor([prompt]), occurrence=values.get("occurrence"))
        scores = torch.maximum(scores, F.pad(own.tokens, (0, len(ids) - len(prompt))))  # type: ignore[arg-type]
    ranges = [part for part in parts if not isinstance(part, str)]
    if ranges:
        start = text.rfind(content)
        if start < 0 or max(end for _, end in ranges) > len(content):
            raise SaliencyError(
                f"characters {ranges} are counted in the prompt, or in the last message, which has {len(content)}"
                f"{'' if start >= 0 else ' and which the chat template changes'}; quote the words instead."
            )
        offsets = reader.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
        spans = [[(start + first, start + end) for first, end in ranges]]
        drawn = Saliency.from_char_spans(spans, torch.tensor([offsets])).tokens
        scores = torch.maximum(scores, F.pad(drawn, (0, len(ids) - drawn.shape[1])))  # type: ignore[arg-type, union-attr]
    return scores


def _begun(
    before: list[int], after: list[int] | None, values: Mapping[str, Any], reader: Reader
) -> tuple[list[int], int | None]:
    """The prompt's tokens, and the first of the answer's that is more than white space; white space before it is prompt."""
    if after is None:
        return before, None
    if after[: len(before)] != before or len(after) == len(before):
        raise FileError(
            f"the tokens of answer {values['answer']!r} merge with those of the prompt before it; begin it or end the thought "
            "with a space or a line break."
        )
    rest = after[len(before) :]
    while len(rest) > 1 and not reader.tokenizer.decode(rest[:1]).strip():
        before, rest = [*before, rest[0]], rest[1:]
    return before, rest[0]


def _seen(line: Line, reader: Reader) -> Asked:
    """A picture and a question."""
    values, processor = line.values, reader.processor
    image = open_upright(line.source.parent / values["image"]).convert("RGB")
    _refuse_text_only(processor, "image_processor", "pictures")
    turn = messages_for(image, values["question"])
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + values.get("thought", "")

    def put(words: str) -> dict[str, Tensor]:
        return dict(processor(text=[words], images=[image], return_tensors="pt"))

    inputs, token = _answered(put, text, values, reader)
    said = Saliency.from_boxes(values["box"], image, unit=values.get("unit", "pixels"))
    return Asked(inputs, said, values.get("answer"), token, f"{values['image']}: {values['question']}")


def _heard(line: Line, reader: Reader) -> Asked:
    """A sound in the prompt of an audio language model, and a question."""
    values = line.values
    sound, seconds, put = sound_in(line.source.parent / values["audio"], reader)
    text = sound_prompt(reader, values.get("question", "")) + values.get("thought", "")

    def inputs_of(words: str) -> dict[str, Tensor]:
        return put(words, sound)

    inputs, token = _answered(inputs_of, text, values, reader)
    said = Saliency.from_seconds(values["seconds"], duration_seconds=seconds)
    return Asked(inputs, said, values.get("answer"), token, f"{values['audio']}, {_seconds(values)}")


def sound_in(path: Any, reader: Reader) -> tuple[Any, float, Callable[[str, Any], dict[str, Tensor]]]:
    """A sound's samples, its seconds, and what makes inputs of a prompt and it.

    Raises:
        FileError: no sound, or a processor that takes none.
    """
    processor = reader.processor
    rate = int(_refuse_text_only(processor, "feature_extractor", "sounds").sampling_rate)
    sound = read_wav(path, rate)

    def put(words: str, own: Any) -> dict[str, Tensor]:
        return dict(processor(text=[words], audio=[own], sampling_rate=rate, return_tensors="pt"))

    return sound, len(sound) / rate, put


def sound_prompt(reader: Reader, question: str) -> str:
    """One user turn with a sound."""
    parts = [{"type": "audio", "audio": "sound.wav"}]
    if question:
        parts.append({"type": "text", "text": question})
    turn = [{"role": "user", "content": parts}]
    text: str = reader.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return text


def _transcribed(line: Line, reader: Reader) -> Asked:
    """A sound for a decoder that reads its encoder by cross-attention; the thought is what is written before the answer."""
    values = line.values
    features, seconds = features_of(line.source.parent / values["audio"], reader)
    begin = first_tokens(reader, values.get("language"))
    before = [*begin, *reader.ids(values.get("thought", ""))]
    after = None
    if "answer" in values:
        after = [*begin, *reader.ids(values.get("thought", "") + values["answer"])]
    ids, token = _begun(before, after, values, reader)
    inputs = {**features, **named(decoder_ids=torch.tensor([ids]))}
    said = Saliency.from_seconds(values["seconds"], duration_seconds=seconds)
    return Asked(inputs, said, values.get("answer"), token, f"{values['audio']}, {_seconds(values)}")


def features_of(path: Any, reader: Reader) -> tuple[dict[str, Tensor], float]:
    """What an encoder hears of a sound, and how many seconds it has."""
    extractor = _refuse_text_only(reader.processor, "feature_extractor", "sounds")
    rate = int(extractor.sampling_rate)
    sound = read_wav(path, rate)
    return dict(extractor(sound, sampling_rate=rate, return_tensors="pt")), len(sound) / rate


def first_tokens(reader: Reader, language: str | None) -> list[int]:
    """What such a decoder is begun with: its start token, and the language and task where it knows several."""
    settings = generation_settings(reader.model)
    ids = [int(setting(settings, "start_token"))]
    find = getattr(reader.processor, "get_decoder_prompt_ids", None)
    if find is None:
        return ids
    several = getattr(settings, "is_multilingual", language is not None)
    asked = {"language": language or "en", "task": "transcribe"} if several else {}
    return [*ids, *(token for _, token in find(**asked, no_timestamps=True))]


def _answered(
    put: Callable[[str], dict[str, Tensor]], text: str, values: Mapping[str, Any], reader: Reader
) -> tuple[dict[str, Tensor], int | None]:
    """Inputs up to the answer's first token that is more than white space, and that token."""
    inputs = put(text)
    if "answer" not in values:
        return inputs, None
    before, whole = (Given(own).ids[0].tolist() for own in (inputs, put(text + values["answer"])))
    ids, token = _begun(before, whole, values, reader)
    space = reader.tokenizer.decode(ids[len(before) :])
    return (put(text + space) if space else inputs), token


def _refuse_text_only(processor: Any, part: str, what: str) -> Any:
    found = getattr(processor, part, None)
    if found is None:
        kind = type(processor).__name__
        raise FileError(f"this model's processor, {kind}, takes no {what}; name a model that does with --model.")
    return found


def _seconds(values: Mapping[str, Any]) -> str:
    start, end = values["seconds"]
    return f"{start:g} to {end:g} s"


def _short(look: Any) -> str:
    text = look if isinstance(look, str) else str(look)
    return text if len(text) <= 40 else f"{text[:37]}..."
