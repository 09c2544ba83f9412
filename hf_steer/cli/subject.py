"""What `sweep` and `calibrate` run on: the embedded model and its pointed-at cells, or the user's own model and pictures."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_steer.cli.command import (
    EXAMPLES,
    add_device,
    add_dtype,
    add_examples_file,
    add_heads,
    add_model,
    add_prompt,
    add_scenes,
    add_seed,
)
from hf_steer.cli.kinds import UNITS, box, check_device, positive, read_heads, refuse_list_of_other
from hf_steer.cli.own import attends_of, load_own, load_processor
from hf_steer.config import AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.errors import ConfigError

if TYPE_CHECKING:
    from hf_steer.evidence.pointing import Pointing
    from hf_steer.saliency import Saliency

DESCRIPTION = f"""\
Without --image, --say and --examples-file it runs on the embedded model: held-out pictures of 2 x 2 digits, one cell of each
pointed at, an open question; the task score is the share of answers that name the pointed-at digit. With --model and --prompt on
your own: with --image the gaze follows the model's own eyes, or --box; with --say, words that the prompt quotes. With
--examples-file each line says where to look; where lines have answers, the task score is the share of answers that hold the right
one.

{EXAMPLES}"""


@dataclass(frozen=True)
class Subject:
    """A patched model, prompts for it, and how its answers are read.

    Attributes:
        model: patched.
        batches: pairs of inputs and what is said about them.
        decode: from lists of token ids to texts.
        task: score per answer; None for the user's own pictures.
        title: what is measured, in words.
    """

    model: Any
    batches: Sequence[tuple[dict[str, Any], Saliency | None]]
    decode: Callable[[list[list[int]]], list[str]]
    task: Callable[[list[Any], int], Sequence[float]] | None
    title: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--image", type=Path, action="append", metavar="FILE",
        help="a picture to ask about; give it again for each further one (default: pictures of digits)",
    )  # fmt: skip
    add_prompt(parser)
    parser.add_argument(
        "--box", type=box, metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="where to look in each picture, in --unit (default: the model's own eyes)",
    )  # fmt: skip
    parser.add_argument(
        "--unit", choices=UNITS, metavar="UNIT",
        help="what --box is counted in: pixels; fraction, 0 to 1; or thousandths, Qwen's 0 to 1000 (default: pixels)",
    )  # fmt: skip
    parser.add_argument("--say", metavar="TEXT", help="words of --prompt to look at, in a model of text (default: none)")
    add_examples_file(parser, "none")
    add_heads(parser, "heads to steer")
    add_scenes(parser, 32, "pictures of digits for the embedded model")
    parser.add_argument(
        "--new-tokens", type=positive, default=40, metavar="N", help="length of an answer, at most, from 1 (default: %(default)s)"
    )
    add_seed(parser, "pictures, cells and intervals")
    add_device(parser)
    add_dtype(parser)


def load_subject(arguments: argparse.Namespace, **saliency: Any) -> Subject:
    """Load and patch the model, and build its prompts.

    Args:
        arguments: of `add_arguments`.
        **saliency: fields of the `SaliencyConfig` that differ from what the subject takes by itself.

    Raises:
        ConfigError: arguments that do not go together, or heads that the model does not have.
        FileError: no such model, picture or file of heads.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # of weight loading; the measurement's own bar says what is going on
    check_device(arguments.device)
    heads = read_heads(arguments.heads)
    ways = [name for name in ("image", "say", "examples_file") if getattr(arguments, name)]
    if len(ways) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in ways)
        raise ConfigError(f"{options} each say what to look at; give one of them.")
    if ways:
        return {"image": _pictures, "say": _quoted, "examples_file": _from_file}[ways[0]](arguments, heads, saliency)
    given = [f"--{name}" for name in ("model", "prompt", "box", "unit") if getattr(arguments, name) is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)} needs --image, at least one, and --prompt; or --say and --prompt; or --examples-file. Without "
            "them the embedded model is used."
        )
    return _scenes(arguments, heads, saliency)


def _scenes(arguments: argparse.Namespace, heads: Any, saliency: dict[str, Any]) -> Subject:
    from hf_steer.embedded import embedded_model_dir
    from hf_steer.evidence.digits import load_digits, sample_scenes
    from hf_steer.evidence.pointing import Pointing
    from hf_steer.patching import patch_model, unpatch_model

    scenes = sample_scenes(load_digits("held-out"), arguments.scenes, seed=arguments.seed)
    pointing = Pointing(embedded_model_dir(), scenes, seed=arguments.seed)
    settings = SaliencyConfig(**{"source": None, "preserve_mass": True, **saliency})
    config = SteerConfig(attention=AttentionConfig(heads=heads, saliency=settings))
    model = patch_model(unpatch_model(pointing.model), config).to(arguments.device)
    numbered = list(pointing.batches("prompts"))
    batches = [(_moved(pointing.inputs(batch), model), pointing.saliency("pointed-at cell", batch)) for batch in numbered]

    def task(answers: list[Any], index: int) -> list[float]:
        return [_names_the_cell(pointing, number, text) for number, text in zip(numbered[index], answers, strict=True)]

    title = f"{arguments.scenes} held-out pictures of 2 x 2 handwritten digits, one of the four pointed at"
    return Subject(model, batches, _reader(pointing.processor), task, title)


def _names_the_cell(pointing: Pointing, number: int, answer: str) -> float:
    from hf_steer.evidence.pointing import ANSWER

    found = ANSWER.search(answer)
    return float(found is not None and int(found.group(1)) == pointing.scenes[number].labels[pointing.cells[number]])


def _pictures(arguments: argparse.Namespace, heads: Any, saliency: dict[str, Any]) -> Subject:
    from hf_steer.analysis.prompts import messages_for
    from hf_steer.embedded import embedded_model_dir
    from hf_steer.saliency import Saliency, open_upright

    if arguments.prompt is None:
        raise ConfigError("--image needs --prompt, the question about it.")
    images = [open_upright(path).convert("RGB") for path in arguments.image]
    unit = arguments.unit or "pixels"
    folder = arguments.model or embedded_model_dir()
    settings = SaliencyConfig(**{"source": "vision_attention" if arguments.box is None else None, **saliency})
    model, processor = _patched(arguments, folder, AttentionConfig(heads=heads, saliency=settings)), load_processor(folder)
    batches = []
    for image in images:  # one at a time: pictures may be large
        text = processor.apply_chat_template(messages_for(image, arguments.prompt), tokenize=False, add_generation_prompt=True)
        inputs = dict(processor(text=[text], images=[image], return_tensors="pt"))
        said = None if arguments.box is None else Saliency.from_boxes(arguments.box, image, unit=unit)
        batches.append((_moved(inputs, model), said))
    box = None if arguments.box is None else ", ".join(f"{side:g}" for side in arguments.box)
    where = "the model's own eyes" if box is None else f"the box {box} in {unit}"
    return Subject(model, batches, _reader(processor), None, f'{len(images)} pictures, "{arguments.prompt}", saliency from {where}')


def _patched(arguments: argparse.Namespace, folder: Any, attention: AttentionConfig, model: Any = None) -> Any:
    """The user's model, and heads that are checked to be its own where they come from a list."""
    from hf_steer.patching import patch_model

    model = load_own(folder, device=arguments.device, dtype=arguments.dtype) if model is None else model
    refuse_list_of_other(arguments.heads, model)
    return patch_model(model, SteerConfig(attention=attention))


def _quoted(arguments: argparse.Namespace, heads: Any, saliency: dict[str, Any]) -> Subject:
    """Words of one prompt."""
    from hf_steer.analysis.asked import Line

    if arguments.prompt is None or arguments.model is None:
        raise ConfigError("--say needs --prompt, the text whose words it quotes, and --model, one that reads text.")
    line = Line("prompt", {"prompt": arguments.prompt, "look": arguments.say}, Path("--prompt"), 1)
    return _of_lines(arguments, heads, saliency, [line], f'"{arguments.prompt}", pointed at "{arguments.say}"')


def _from_file(arguments: argparse.Namespace, heads: Any, saliency: dict[str, Any]) -> Subject:
    from hf_steer.analysis.asked import read_lines

    lines = read_lines(arguments.examples_file)
    return _of_lines(arguments, heads, saliency, lines, f"{len(lines)} examples of {arguments.examples_file}")


def _of_lines(arguments: argparse.Namespace, heads: Any, saliency: dict[str, Any], lines: Any, title: str) -> Subject:
    """Prompts as lines of an examples file say them."""
    from hf_steer.analysis.asked import Reader, ask, together
    from hf_steer.embedded import embedded_model_dir

    folder = arguments.model or embedded_model_dir()
    processor = load_processor(folder)
    model = load_own(folder, device=arguments.device, dtype=arguments.dtype)
    asked = [ask(line, Reader(processor, model)) for line in lines]
    settings = SaliencyConfig(**{"source": None, **saliency})
    attends: Any = attends_of(model, arguments)
    _patched(arguments, folder, AttentionConfig(heads=heads, saliency=settings, attends=attends), model)
    grouped = together(asked, model)
    answers = [[one.answer for one in group] for group, _, _ in grouped]
    every = all(answer is not None for own in answers for answer in own)

    def task(said: list[Any], index: int) -> list[float]:
        wanted = [answer.strip().lower() for answer in answers[index] if answer is not None]
        return [float(right in text.lower()) for right, text in zip(wanted, said, strict=True)]

    batches = [(_moved(inputs, model), statement) for _, inputs, statement in grouped]
    return Subject(model, batches, _reader(processor), task if every else None, title)


def as_spans(subject: Subject) -> Subject:
    """The same, with a saliency of ones and zeros: tokens that lie in the box for the most part, or the whole picture."""
    from hf_steer.analysis.pointed import scores_in_force
    from hf_steer.analysis.prompts import Batch, span_of, steered_heads
    from hf_steer.patching import anatomy_of
    from hf_steer.saliency import Saliency

    model, layer = subject.model, min(steered_heads(subject.model))
    batches = []
    for inputs, said in subject.batches:
        whole = span_of(anatomy_of(model), inputs, "image") if said is None else None
        inside = scores_in_force(model, Batch(inputs, said), layer) >= 0.5 if whole is None else whole
        batches.append((inputs, Saliency.from_tokens(inside.float())))
    return dataclasses.replace(subject, batches=batches)


def _reader(processor: Any) -> Callable[[list[list[int]]], list[str]]:
    def decode(tokens: list[list[int]]) -> list[str]:
        return list(processor.batch_decode(tokens, skip_special_tokens=True))

    return decode


def _moved(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    return {name: value.to(model.device) for name, value in inputs.items()}
