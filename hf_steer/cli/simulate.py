"""`hf-steer simulate`: the published simulation of steering, run again."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from hf_steer.cli.command import Command, add_list, add_option, add_output, listed
from hf_steer.cli.kinds import number, positive, whole
from hf_steer.files import write_whole

if TYPE_CHECKING:
    from hf_steer.analysis import SimulationRow

DESCRIPTION = """\
Run the simulation of "Cross-Modal Attention Steerability via Residual Latent Shifting" (2026-02-15); no model is needed.

One attention layer of random logits, Z ~ Normal(0, 0.1), attends with A = softmax(Z). A saliency s = |Normal(0, 1)|, scaled
into [0, 1], steers it: A' = softmax(log(A + 1e-8) + λ·s). The command prints, for each strength λ, the mean over the seeds of

  entropy reduction   by how much A' is more concentrated than A, in per cent of A's entropy
  KL                  KL(A ‖ A'), how far the distribution has moved, in nats
  folded - dense      largest difference between a probability of A' and the same with λ and s as one more channel of queries
                      and keys, the form that hf_steer runs in models: float32 rounding

and writes steerability_plot.png (one query before and after), lambda_tradeoff.png (entropy reduction against KL, the published
values as crosses) and simulation.csv. The defaults give the published table to the last digit, in about ten seconds.
"""
_SEEDS = (0, 1, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_list(parser, "--strengths", number, "NUMBER", "λ (default: the nine published ones, 0 to 1)")
    add_list(parser, "--seeds", whole, "N", f"one draw each, from 0 (default: {listed(_SEEDS)})")
    parser.add_argument(
        "--tokens", type=positive, default=1024, metavar="N", help="queries, and keys, of the layer, from 1 (default: %(default)s)"
    )
    add_option(
        parser, "--num-heads", former="--heads", type=positive, default=32, metavar="N",
        help="heads of the layer, from 1 (default: %(default)s)",
    )  # fmt: skip
    add_output(parser, "simulation", "the pictures and the table")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from hf_steer.evidence.plots import plot_steerability, plot_tradeoff
    from hf_steer.evidence.simulation import STRENGTHS, simulate

    started = time.perf_counter()
    strengths = STRENGTHS if arguments.strengths is None else arguments.strengths
    seeds, tokens, heads, folder = arguments.seeds or _SEEDS, arguments.tokens, arguments.num_heads, arguments.output
    rows = simulate(strengths, seeds, tokens, heads)
    conditions = {
        "seeds": seeds, "tokens": tokens, "heads": heads,
        "torch": torch.__version__, "date": datetime.now(timezone.utc).date().isoformat(),
    }
    table = folder / "simulation.csv"
    write_whole(table, _csv(rows, conditions))
    pictures = [
        plot_steerability(folder / "steerability_plot.png", seed=seeds[0], tokens=tokens),
        plot_tradeoff(rows, folder / "lambda_tradeoff.png"),
    ]
    files, seconds = [str(path) for path in (*pictures, table)], time.perf_counter() - started
    if arguments.json:
        found = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"rows": found, **conditions, "files": files, "seconds": round(seconds, 1)}))
        return 0
    print(f"\n{heads} heads of random attention, {tokens} queries x {tokens} keys, mean over seeds {', '.join(map(str, seeds))}:\n")
    print(f"{'λ':>6}{'entropy reduction (%)':>25}{'KL(original ‖ steered)':>25}{'folded - dense':>18}")
    for row in rows:
        print(
            f"{_two_decimals(row.strength):>6}{row.entropy_reduction_percent:>25.4f}{row.kl_nats:>25.6f}"
            f"{row.folded_max_difference:>18.1e}"
        )
    print(f"\nPictures and table: {', '.join(files)}  ({seconds:.0f} s)")
    return 0


def _csv(rows: tuple[SimulationRow, ...], conditions: dict[str, Any]) -> bytes:
    """A row per strength, with what it was measured under in columns of its own."""
    lines = [{**dataclasses.asdict(row), **conditions, "seeds": " ".join(map(str, conditions["seeds"]))} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode()


def _two_decimals(strength: float) -> str:
    """As the published table writes λ, where that loses nothing."""
    rounded = f"{strength:.2f}"
    return rounded if float(rounded) == strength else f"{strength:g}"


SIMULATE = Command("simulate", "the published toy simulation of steering, digit for digit", DESCRIPTION, add_arguments, run)
