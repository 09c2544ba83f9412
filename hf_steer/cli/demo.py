"""`hf-steer demo`: the embedded model, steered, beside its controls."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

from hf_steer.cli.command import Command, add_model, add_output, add_scenes, add_seed
from hf_steer.files import write_whole

DESCRIPTION = """\
Load the embedded model (a Qwen2-VL of a million parameters that reads handwritten digits and thinks before it answers),
ask it an open question about pictures that it was never trained on, and steer its gaze to one cell of each.

Prints a table: what the saliency was on, strength λ, the share of answers that name the pointed-at digit with its 95 %
interval, the share that names any digit of the picture, and KL(unsteered ‖ steered) of the answer in nats. The strength of
the controls is chosen on other scenes. Writes pictures and the table as CSV. About half a minute on two cores.
"""
NOTES = """\
Uniform saliency says nothing, so it is normalised to zero and changes nothing. "Mass not kept" is the saliency on the
pointed-at cell with preserve_mass=False: attention then leaves the text for the picture, too, and the thought may fall apart."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "folder of another model in the manner of the embedded one (default: the embedded one)")
    add_scenes(parser, 120, "held-out pictures to report on")
    add_seed(parser, "pictures, cells and questions")
    add_output(parser, "demo", "the pictures and the table")


def run(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from hf_steer.evidence.plots import plot_examples, plot_strength
    from hf_steer.evidence.pointing import run_pointing

    logging.disable_progress_bar()  # of weight loading; the demo's own bars say what is going on
    started = time.perf_counter()
    result = run_pointing(folder=arguments.model, scenes=arguments.scenes, seed=arguments.seed)
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
    print(f"\n{arguments.scenes} held-out pictures of 2 x 2 handwritten digits, one of the four pointed at. Question, for example:")
    print(f'"{result.examples[0].question}"\n')
    print(f"{'saliency on':<18}{'λ':>4}   {'names the pointed-at digit':<28}{'names a digit there':>20}{'KL (nats)':>12}")
    for row in result.rows:
        interval = f"[{row.low:.2f}, {row.high:.2f}]"
        print(
            f"{row.saliency:<18}{row.strength:>4g}   {row.pointed_share:>5.2f}  {interval:<21}"
            f"{row.readable_share:>20.2f}{row.kl_nats:>12.3f}"
        )
    print(f"\nThe controls run at λ = {result.best_strength:g}, the best on {max(1, arguments.scenes // 2)} other pictures.")
    print(NOTES)
    print(f"Pictures and table: {', '.join(str(path) for path in (*pictures, table))}  ({seconds:.0f} s)")
    return 0


DEMO = Command("demo", "steer the embedded model, with controls", DESCRIPTION, add_arguments, run)
