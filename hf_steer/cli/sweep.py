"""`hf-steer sweep`: what each strength does."""

from __future__ import annotations

import argparse
import json
import time

from hf_steer.cli import subject
from hf_steer.cli.command import Command, add_list, add_output, listed
from hf_steer.cli.kinds import number

DESCRIPTION = f"""\
Measure a model at several strengths λ: entropy and shift of the steered heads' attention, its share on what is pointed at, how many
answers and tokens change, KL(unsteered ‖ steered) of the next token in nats, a task score with its 95 % interval, and the answers.

{subject.DESCRIPTION}
Writes a picture, and a CSV with a line per strength as each is done. Run again, it goes on where it was cut short.
"""
_STRENGTHS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_list(parser, "--strengths", number, "NUMBER", f"λ; negative turns the gaze away (default: {listed(_STRENGTHS)})")
    subject.add_arguments(parser)
    add_output(parser, "sweep", "sweep.csv and sweep.png")


def run(arguments: argparse.Namespace) -> int:
    from hf_steer.analysis import sweep_strength
    from hf_steer.analysis.plots import plot_sweep

    started = time.perf_counter()
    chosen = subject.load_subject(arguments)
    table = arguments.output / "sweep.csv"
    result = sweep_strength(
        chosen.model, chosen.batches, arguments.strengths or _STRENGTHS, task=chosen.task, decode=chosen.decode,
        new_tokens=arguments.new_tokens, path=table, seed=arguments.seed,
    )  # fmt: skip
    files = [str(table), str(plot_sweep(result, arguments.output / "sweep.png"))]
    seconds = round(time.perf_counter() - started, 1)
    if arguments.json:
        print(json.dumps({"rows": [row.flat() for row in result.rows], "files": files, "seconds": seconds}))
        return 0
    print(f"\n{chosen.title}.\n\n{result}\n\n{result.answers_text()}\n\nTable and picture: {', '.join(files)}  ({seconds:.0f} s)")
    return 0


SWEEP = Command("sweep", "what each strength does", DESCRIPTION, add_arguments, run)
