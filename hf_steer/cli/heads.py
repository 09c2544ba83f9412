"""`hf-steer heads`: which heads to steer."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_steer.cli.command import Command, add_device, add_model, add_output, add_scenes, add_seed
from hf_steer.cli.kinds import check_device, number, one_of, positive
from hf_steer.errors import ConfigError
from hf_steer.files import write_whole

if TYPE_CHECKING:
    from hf_steer.analysis.heads import HeadExample, HeadResult

RULES = ("forward", "effect", "mass", "localisation", "pointing", "selectivity")
"""`hf_steer.analysis.heads.RULES`, without importing torch for `--help`."""

DESCRIPTION = """\
Choose the attention heads to steer, and report on other pictures whether they are better than random heads.

By default on the embedded model: questions about four handwritten digits; heads are chosen on training digits and reported on
held-out ones (about a minute). For pointing and selectivity the question names the digit's place; for the other rules it is
open, and steering alone says which digit is meant. On your own model: --model, and --examples-file with one JSON object a line:

  {"image": "cat.png", "question": "What is this?", "box": [40, 10, 200, 180], "answer": "cat", "thought": "I see ...</think>"}

answer and thought are optional; the box is (left, top, right, bottom) in pixels; half of the examples report.

Which rule when:
  forward       you have answers, and time: grows a set by the head that most raises the share of right answers, so heads that do
                the same are not taken twice. About --count times as long as effect; --shortlist shortens it.
  effect        you have answers: steers each head alone and ranks by the change of log p(answer).
  pointing      the question itself says where to look: how often the most attended token is in the box.
  selectivity   likewise, but by how much of the attention is there.
  localisation  boxes are few or rough, and pictures large: compact attention among heads of much mass (arXiv 2503.06287).
  mass          the simplest: attention to the picture, wherever in it. On the embedded model's pictures of 2 x 2 tokens, where
                all attention is compact, localisation is the same.

The last four take one pass over the examples; effect takes one for each head. The verdict is "found" where the gain over random
heads of the same layers and the gain over the unsteered model are above 0 (95 % intervals); otherwise "none found", and why.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--examples-file", type=Path, metavar="FILE", help="JSON lines: examples for your own model (default: digits, as above)"
    )
    parser.add_argument("--count", type=positive, default=4, metavar="N", help="heads to choose, from 1 (default: %(default)s)")
    parser.add_argument(
        "--rule", type=one_of(RULES), metavar="NAME", help="one of those above (default: forward with answers, selectivity without)"
    )
    add_scenes(parser, 200, "pictures of digits to choose with, and as many to report on", former="--examples")
    parser.add_argument(
        "--strength", type=number, default=16.0, metavar="NUMBER", help="λ while measuring; negative: away (default: %(default)s)"
    )
    parser.add_argument(
        "--null-sets", type=positive, default=20, metavar="N", help="random sets of each kind, from 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--shortlist", type=positive, metavar="N", help="forward tries so many heads, the best alone; from 1 (default: all heads)"
    )
    add_seed(parser, "examples, split and random sets")
    add_device(parser)
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

    model, examples, report = _own(arguments) if arguments.examples_file else _embedded(arguments)
    return find_grounding_heads(
        model,
        examples,
        report=report,
        count=arguments.count,
        rule=arguments.rule,
        strength=arguments.strength,
        null_sets=arguments.null_sets,
        shortlist=arguments.shortlist,
        seed=arguments.seed,
    )


def _embedded(arguments: argparse.Namespace) -> tuple[Any, list[HeadExample], list[HeadExample]]:
    from transformers import AutoModelForImageTextToText

    from hf_steer.embedded import embedded_model_dir
    from hf_steer.evidence.scenes import digit_examples

    if arguments.model is not None:
        raise ConfigError("--model needs --examples-file: what your model is to look at, and where.")
    folder, asked = embedded_model_dir(), arguments.rule in ("pointing", "selectivity")
    examples = digit_examples(folder, "training", arguments.scenes, seed=arguments.seed, asked=asked)
    report = digit_examples(folder, "held-out", arguments.scenes, seed=arguments.seed, asked=asked)
    return AutoModelForImageTextToText.from_pretrained(folder).to(arguments.device).eval(), examples, report


def _own(arguments: argparse.Namespace) -> tuple[Any, list[HeadExample], None]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from hf_steer.analysis.heads.jsonl import read_jsonl
    from hf_steer.embedded import embedded_model_dir

    name = arguments.model or embedded_model_dir()
    examples = read_jsonl(arguments.examples_file, AutoProcessor.from_pretrained(name))
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").to(arguments.device).eval()
    return model, examples, None


HEADS = Command("heads", "which heads to steer", DESCRIPTION, add_arguments, run)
