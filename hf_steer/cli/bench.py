"""`hf-steer bench`: how fast steering is, against the plain model and against everything else."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_steer.cli.command import Command, add_device, add_list, add_output
from hf_steer.cli.kinds import check_device, positive, seconds, word
from hf_steer.errors import ConfigError
from hf_steer.files import write_whole

if TYPE_CHECKING:
    from hf_steer.evidence.bench import Bench, Choice

_QUIET = {"KINETO_LOG_LEVEL": "9", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""torch's profiler, which measures memory, logs every start and stop, and what was allocated before."""
DESCRIPTION = """\
Time steering against the same model unsteered, and against other ways to get the same attention. Nothing is downloaded: models
have random weights of real sizes. Every head of every layer is steered with strength 2 towards a third of the tokens.

  levels      attention  one attention function on random queries, keys and values
              layer      one decoder layer
              model      a whole decoder: 1 or 2 layers on a CPU, as many as fit on a GPU, a vocabulary of 2048
  phases      prefill    a prompt, batch 1
              decode     one new token on a cache, batch 1 and 16
              training   forward and backward, batch 1
  contenders  plain      the floor: transformers' sdpa, a model that was never patched
              hf_steer, and the same switched off (disabled, strength 0)
              dense mask         a heads x queries x keys mask, given to sdpa
              position_bias      transformers' own argument of its sdpa
              edited weights     eager attention with edited logits, as PASTA, PAI and their kind do
              pastalib, nnsight  the packages themselves, where installed: pip install 'hf-steer[rivals]'

Each contender is first verified: its result, in training its gradients too, against the same in float64. error is its error in
units of the plain model's own; above 4 (eager attention: 10) the command fails. Then all run in turns, one call each a round.
x is the median over rounds of contender / plain, the brackets hold the middle 60 %. MB is the peak of one call above what was
there before.

Writes bench-DEVICE.csv (a row per measurement, with versions and date; anew after each cell) and bench-DEVICE.png. Bars are the
project's own limits; a missed one is printed, and is no failure: on a shared machine time is noisy.

--quick answers one question, what steering costs here: attention alone and one layer of Qwen2-VL-2B's shape in a model, prefill
and decode, hf_steer on and off beside the dense mask; half a minute on two cores, one screen, and bench-DEVICE-quick.csv.

  hf-steer bench --quick                                     what does it cost me?
  hf-steer bench                                             1024 and 4096 tokens, float32 and bfloat16 (about a quarter of an hour)
  hf-steer bench --device cuda                               1024 to 32768 tokens, bfloat16, every backend
  hf-steer bench --levels attention --shapes qwen2-vl-7b --tokens 2048 --phases prefill --backends folded,mask
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser, "cpu or cuda")
    add_list(parser, "--levels", word, "NAME", "attention, layer, model (default: all)", former="--level")
    add_list(parser, "--phases", word, "NAME", "prefill, decode, training (default: all)", former="--phase")
    shapes = "seed, qwen2-vl-2b, qwen2-vl-7b, llama-8b, llama-1b, tiny (default: all but the last; of layers and models, fewer)"
    add_list(parser, "--shapes", word, "NAME", shapes, former="--shape")
    dtypes = "float32, bfloat16, float16 (default: the first two; on cuda bfloat16)"
    add_list(parser, "--dtypes", word, "NAME", dtypes, former="--dtype")
    lengths = "lengths of the prompt or the cache, from 2 (default: 1024,4096; on cuda also 16384,32768)"
    add_list(parser, "--tokens", positive, "N", lengths)
    parser.add_argument(
        "--layers", type=positive, metavar="N", help="of whole models, from 1 (default: 2, for long prompts 1; on cuda what fits)"
    )
    add_list(parser, "--contenders", word, "NAME", "only these of those above, beside plain and hf_steer (default: all)")
    backends = "backends of hf_steer that are timed by name, too (default: none; on cuda all)"
    add_list(parser, "--backends", word, "NAME", backends, former="--backend")
    parser.add_argument(
        "--seconds", type=seconds, metavar="SECONDS",
        help="of timing per cell, after three rounds in any case (default: 2; on cuda and with --quick 1)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few cells and one screen; options above choose others")
    add_output(parser, "bench", "the table and the picture")


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    for setting, level in _QUIET.items():  # before torch is imported
        os.environ.setdefault(setting, level)
    choice = _choice(arguments)
    check_device(arguments.device)
    table = arguments.output / f"bench-{arguments.device}{'-quick' * arguments.quick}.csv"
    bench = _measure(arguments, choice, table)
    files = [table]
    if not arguments.quick:
        from hf_steer.evidence.plots import plot_bench

        files.append(plot_bench(bench.rows, table.with_suffix(".png")))
    taken, written = time.perf_counter() - started, [str(path) for path in files]
    if arguments.json:
        report = {"rows": bench.rows, "wrong": bench.wrong, "left_out": bench.left_out, "files": written}
        print(json.dumps({**report, "quick": arguments.quick, "seconds": round(taken, 1)}))
    else:
        print(_text(arguments, bench))
        print(f"\n{', '.join(written)}  ({taken:.0f} s)")
    return 1 if bench.wrong else 0


def _text(arguments: argparse.Namespace, bench: Bench) -> str:
    from hf_steer.evidence.bench.screen import screen
    from hf_steer.evidence.bench.table import summary

    notes = [f"left out: {line}" for line in bench.left_out] + [f"WRONG: {line}" for line in bench.wrong]
    if not arguments.quick:
        return "\n".join(["", summary(bench.rows), *notes])
    on = "" if arguments.device == "cpu" else f" --device {arguments.device}"
    full = f"A quick look at few cells, few rounds each. All of it, with bars and rivals: hf-steer bench{on}"
    return "\n".join([screen(bench.rows), *notes, "", full])


def _choice(arguments: argparse.Namespace) -> Choice:
    """What a run of this kind measures, and what was asked for instead."""
    from hf_steer.evidence.bench import FULL, QUICK, Choice

    if arguments.device not in FULL:
        raise ConfigError(f"--device must be cpu or cuda; got {arguments.device!r}.")
    given = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(Choice)}
    chosen = (QUICK if arguments.quick else FULL)[arguments.device]
    return dataclasses.replace(chosen, **{name: value for name, value in given.items() if value is not None})


def _measure(arguments: argparse.Namespace, choice: Choice, table: Path) -> Bench:
    """Run it; the table is written anew after each cell."""
    from tqdm.auto import tqdm

    from hf_steer.analysis.tables import as_csv
    from hf_steer.evidence.bench import run_bench

    cells, contenders = choice.cells(arguments.device), choice.rows()
    bar = tqdm(total=len(cells), desc="bench", unit="cell", disable=True if arguments.json else None)

    def progress(each: Any) -> Any:
        for cell in each:
            bar.set_postfix_str(f"{cell.level} {cell.shape.name} {cell.phase} {cell.batch} x {cell.tokens} {cell.dtype}")
            yield cell
            bar.update()

    with bar:
        return run_bench(
            cells, contenders, seconds=choice.seconds, progress=progress,
            keep=lambda rows: write_whole(table, as_csv(rows).encode()),
        )  # fmt: skip


BENCH = Command("bench", "how fast steering is, beside the plain model and its rivals", DESCRIPTION, add_arguments, run)
