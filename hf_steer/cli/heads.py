"""`hf-steer heads`: which heads to steer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_steer.cli.command import (
    EXAMPLES,
    Command,
    add_device,
    add_dtype,
    add_examples_file,
    add_model,
    add_output,
    add_scenes,
    add_seed,
)
from hf_steer.cli.kinds import check_device, number, one_of, positive
from hf_steer.cli.own import attends_of, load_own, load_processor
from hf_steer.errors import ConfigError
from hf_steer.files import write_whole

if TYPE_CHECKING:
    from hf_steer.analysis.heads import HeadExample, HeadResult

RULES = ("forward", "effect", "slope", "mass", "localisation", "pointing", "selectivity")
"""`hf_steer.analysis.heads.RULES`, without importing torch for `--help`."""

SCENES, LISTS = 200, 40
"""Pictures of digits, or lists of text, to choose with and as many to report on, where that is not said."""

DESCRIPTION = f"""\
Choose the attention heads to steer, and report on other examples whether they are better than random heads.

By default on the embedded model: questions about four handwritten digits; heads are chosen on training digits and reported on
held-out ones (about a minute). For pointing and selectivity the question names the digit's place; for the other rules it is
open, and steering alone says which digit is meant. With --model alone, a model that reads text: questions about lists of entries,
of which one is pointed at. With --model and --examples-file, your own.

{EXAMPLES}
How many examples: at least 40, half of which choose and half report: of 20 answers a share is known to about a fifth, and heads
that beat random ones by less are not told from them; of 100 to a tenth. All of them have an answer, or none.

In a model of more than 64 heads the search has two stages: one pass forwards and one back gives every head its slope, and those of
the steepest (--candidates) are steered one by one.

Which rule when:
  forward       you have answers, and time: grows a set by the head that most raises the share of right answers, so heads that do
                the same are not taken twice. About --count times as long as effect; --shortlist shortens it.
  effect        you have answers: steers each head alone and ranks by the change of log p(answer).
  slope         likewise, but by how log p(answer) begins to change with each head's λ: one pass forwards and one back for all.
  pointing      the question itself says where to look: how often the most attended token is in the box.
  selectivity   likewise, but by how much of the attention is there.
  localisation  boxes are few or rough, and pictures large: compact attention among heads of much mass (arXiv 2503.06287).
  mass          the simplest: attention to the picture, wherever in it. On the embedded model's pictures of 2 x 2 tokens, where
                all attention is compact, localisation is the same.

The last five take one pass over the examples; effect takes one for each head that is steered. The verdict is "found" where the
gain over random heads of the same layers and the gain over the unsteered model are above 0 (95 % intervals); otherwise "none
found", and why.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_examples_file(parser, "digits or lists, as above")
    parser.add_argument("--count", type=positive, default=4, metavar="N", help="heads to choose, from 1 (default: %(default)s)")
    parser.add_argument(
        "--rule", type=one_of(RULES), metavar="NAME",
        help="one of those above (default: with answers forward, in a model of many heads effect; selectivity without)",
    )  # fmt: skip
    add_scenes(
        parser, None,
        f"pictures of digits, or lists, to choose with, and as many to report on, from 1 (default: {SCENES} or {LISTS})",
        former="--examples",
    )  # fmt: skip
    parser.add_argument(
        "--strength", type=number, metavar="NUMBER",
        help="λ while measuring; negative: away (default: 32 within pictures, which keep their mass; else 4)",
    )  # fmt: skip
    parser.add_argument(
        "--null-sets", type=positive, default=20, metavar="N", help="random sets of each kind, from 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--candidates", type=positive, metavar="N",
        help="heads that are steered one by one, from 1 (default: all of at most 64 heads, else 24, or three for each to choose)",
    )  # fmt: skip
    parser.add_argument(
        "--shortlist", type=positive, metavar="N", help="forward tries so many heads, the best alone; from 1 (default: all heads)"
    )
    add_seed(parser, "examples, split and random sets")
    add_device(parser)
    add_dtype(parser)
    add_output(parser, "heads", "heads.json, heads.csv and heads.png")


def run(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from hf_steer.analysis.plots import plot_heads

    logging.disable_progress_bar()  # of weight loading
    started = time.perf_counter()
    check_device(arguments.device)
    result = _find(arguments)
    output: Path = arguments.output
    write_whole(output / "heads.csv", result.to_csv().encode())
    files = [result.save(output / "heads.json"), output / "heads.csv", plot_heads(result, output / "heads.png")]
    seconds = time.perf_counter() - started
    if arguments.json:
        print(json.dumps({**json.loads(result.to_json()), "files": [str(path) for path in files], "seconds": round(seconds, 1)}))
    else:
        print(f"{result}\n\n{', '.join(str(path) for path in files)}  ({seconds:.0f} s)")
    return 0


def _find(arguments: argparse.Namespace) -> HeadResult:
    from hf_steer.analysis.heads import find_grounding_heads

    model, examples, report, attends = _own(arguments) if arguments.examples_file or arguments.model else _embedded(arguments)
    found = find_grounding_heads(
        model,
        examples,
        report=report,
        count=arguments.count,
        rule=arguments.rule,
        strength=arguments.strength,
        attends=attends,
        null_sets=arguments.null_sets,
        candidates=arguments.candidates,
        shortlist=arguments.shortlist,
        seed=arguments.seed,
    )
    return _noted(found, arguments)


def _noted(found: HeadResult, arguments: argparse.Namespace) -> HeadResult:
    """With the command and the weights that it was found with, without folders of this machine."""
    from hf_steer.analysis.heads.origin import weights_sha256
    from hf_steer.embedded import embedded_model_dir

    folder = arguments.model or embedded_model_dir()
    given = {"model": Path(folder).name, "examples-file": None, "count": arguments.count, "rule": arguments.rule}
    given |= {"scenes": arguments.scenes, "strength": arguments.strength, "candidates": arguments.candidates}
    given |= {"shortlist": arguments.shortlist, "null-sets": arguments.null_sets, "seed": arguments.seed}
    given |= {"dtype": arguments.dtype if arguments.dtype != "auto" else None}
    if arguments.examples_file is not None:
        given["examples-file"] = arguments.examples_file.name
    command = " ".join(["hf-steer heads", *(f"--{name} {value}" for name, value in given.items() if value is not None)])
    origin = found.provenance
    if origin is not None:
        origin = dataclasses.replace(origin, command=command, weights_sha256=weights_sha256(folder))
    return dataclasses.replace(found, provenance=origin)


Examples = tuple[Any, "list[HeadExample]", "list[HeadExample] | None", Any]


def _embedded(arguments: argparse.Namespace) -> Examples:
    from hf_steer.embedded import embedded_model_dir
    from hf_steer.evidence.scenes import digit_examples

    folder, asked = embedded_model_dir(), arguments.rule in ("pointing", "selectivity")
    count = arguments.scenes or SCENES
    examples = digit_examples(folder, "training", count, seed=arguments.seed, asked=asked)
    report = digit_examples(folder, "held-out", count, seed=arguments.seed, asked=asked)
    return load_own(folder, device=arguments.device), examples, report, "self"


def _own(arguments: argparse.Namespace) -> Examples:
    from hf_steer.analysis.heads.jsonl import read_jsonl
    from hf_steer.embedded import embedded_model_dir

    name = arguments.model or embedded_model_dir()
    if arguments.examples_file is not None:
        processor = load_processor(name)
        model = load_own(name, device=arguments.device, dtype=arguments.dtype)
        return model, read_jsonl(arguments.examples_file, processor, model=model), None, attends_of(model, arguments)
    model = load_own(name, device=arguments.device, dtype=arguments.dtype)
    return model, _lists(arguments, model, load_processor(name)), None, "self"


def _lists(arguments: argparse.Namespace, model: Any, processor: Any) -> list[HeadExample]:
    """Lists with entries that could all be meant, for a model that reads text."""
    from hf_steer.analysis.asked import Line, Reader, ask
    from hf_steer.analysis.heads import HeadExample
    from hf_steer.evidence.searching import search_prompts
    from hf_steer.ground.decoders import reads_encoder
    from hf_steer.patching import anatomy_of

    if anatomy_of(model).placeholder_ids or reads_encoder(model):
        raise ConfigError("--model needs --examples-file: what your model is to look at, and where. See --help.")
    lines = search_prompts(2 * (arguments.scenes or LISTS), seed=arguments.seed)
    reader = Reader(processor, model)
    asked = [ask(Line("prompt", line, Path("lists"), number), reader) for number, line in enumerate(lines, 1)]
    return [HeadExample(own.inputs, own.said, answer=own.answer_token) for own in asked]


HEADS = Command("heads", "which heads to steer", DESCRIPTION, add_arguments, run)
