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
measurement along the unsteered answers. With --target-mass: the one that brings the picture's (or the box's, or the cell's) share
of attention to a number, in closed form from the mean over the prompt's tokens, and what comes out when it is measured.

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
        text = _budget_text(result)
    else:
        chosen = subject.as_spans(subject.load_subject(arguments, normalize="none", preserve_mass=False))
        result = strength_for_mass(chosen.model, chosen.batches, arguments.target_mass)
        text = _mass_text(result)
    file = arguments.output / "calibration.json"
    write_whole(file, result.to_json().encode())
    seconds = round(time.perf_counter() - started, 1)
    if arguments.json:
        print(json.dumps({**json.loads(result.to_json()), "files": [str(file)], "seconds": seconds}))
    else:
        print(f"\n{chosen.title}.\n\n{text}\n\nStrengths: {file}  ({seconds:.0f} s)")
    return 0


def _budget_text(result: Any) -> str:
    from hf_steer.analysis.tables import as_text

    if isinstance(result.strength, float):
        curve = sorted((one.strength, one.kl_nats) for one in result.evaluations)
        table = as_text([{"λ": strength, "KL (nats)": kl} for strength, kl in curve])
        head = f"λ = {result.strength:.4g} keeps the budget:"
    else:
        places = [(layer, head, value) for layer, own in result.strength.items() for head, value in own.items()]
        table = as_text([{"layer": layer, "head": head, "λ": value} for layer, head, value in places])
        head = "These strengths keep the budget together:"
    notes = f"{head} KL {result.kl_nats:.4g} of {result.budget_nats:.4g} nats per token, {len(result.evaluations)} measured."
    if result.largest_kept:
        notes += " The search ended at --largest; more may keep it, too."
    if not result.monotone:
        notes += " Divergence did not grow steadily with strength: a larger one may keep the budget, too."
    return f"{notes}\n\n{table}"


def _mass_text(result: Any) -> str:
    from hf_steer.analysis.tables import as_text

    rows = [
        {"layer": layer, "head": head, "λ": value, "unsteered share": result.unsteered_mass[layer][head],
         "steered share": result.steered_mass[layer][head]}
        for layer, own in result.strength.items()
        for head, value in own.items()
    ]  # fmt: skip
    return (
        f"{result.target_mass:g} of the attention is met in the mean log-odds of {result.queries} tokens. Their mean share differs "
        "from it, since a share is not linear in its log-odds; and a layer after a steered one sees other inputs than those that "
        f"were measured.\n\n{as_text(rows)}"
    )


CALIBRATE = Command("calibrate", "the strength for a budget, or for a share of attention", DESCRIPTION, add_arguments, run)
