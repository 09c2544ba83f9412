"""`hf-steer calibrate`: the strength for a budget, or for a share of attention."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from hf_steer.cli import subject
from hf_steer.cli.command import Command, add_output
from hf_steer.cli.kinds import number
from hf_steer.files import write_whole

DESCRIPTION = f"""\
Find a strength λ. With --budget: the largest whose mean KL(unsteered ‖ steered) of the next token keeps a budget in nats, by
measurement along the unsteered answers. With --target-mass: the one for each head that brings the share of attention on what is
pointed at (a box, words, seconds; else the picture) to a number, in the mean over the prompt's tokens; and what comes out.

{subject.DESCRIPTION}
Writes the strengths as JSON, with the heads that they are for; --heads takes that file.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--budget", type=number, metavar="NATS", help="mean KL per token to keep, in nats, above 0")
    goal.add_argument("--target-mass", type=number, metavar="SHARE", help="share of attention to reach, between 0 and 1")
    parser.add_argument("--per-head", action="store_true", help="with --budget: a strength for each head, not one for all")
    parser.add_argument(
        "--largest", type=number, default=64.0, metavar="NUMBER",
        help="with --budget: λ that is not exceeded, above 0 (default: %(default)s)",
    )  # fmt: skip
    subject.add_arguments(parser)
    add_output(parser, "calibration", "calibration.json")


def run(arguments: argparse.Namespace) -> int:
    from hf_steer.analysis import calibrate_strength, strength_for_mass

    started = time.perf_counter()
    result: Any
    if arguments.budget is not None:
        chosen = subject.load_subject(arguments)
        result = calibrate_strength(
            chosen.model, chosen.batches, arguments.budget, per_head=arguments.per_head, largest=arguments.largest,
            new_tokens=arguments.new_tokens,
        )  # fmt: skip
    else:
        chosen = subject.as_spans(subject.load_subject(arguments, normalize="none", preserve_mass=False))
        result = strength_for_mass(chosen.model, chosen.batches, arguments.target_mass)
    file = arguments.output / "calibration.json"
    write_whole(file, result.to_json().encode())
    seconds = round(time.perf_counter() - started, 1)
    if arguments.json:
        print(json.dumps({**json.loads(result.to_json()), "files": [str(file)], "seconds": seconds}))
    else:
        print(f"\n{chosen.title}.\n\n{result}\n\nStrengths: {file}  ({seconds:.0f} s)")
    return 0


CALIBRATE = Command("calibrate", "the strength for a budget, or for a share of attention", DESCRIPTION, add_arguments, run)
