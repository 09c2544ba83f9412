"""`hf-steer bench`: how fast steering is, against the plain model and against everything else."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_steer.cli.command import Command, positive
from hf_steer.errors import ConfigError, FileError
from hf_steer.files import write_whole

if TYPE_CHECKING:
    from hf_steer.evidence.bench import Bench

_SECONDS = {"cpu": 2.0, "cuda": 1.0}
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

  hf-steer bench --quick                                     everything once on a tiny shape: does it run? (seconds)
  hf-steer bench                                             1024 and 4096 tokens, float32 and bfloat16 (about a quarter of an hour)
  hf-steer bench --device cuda                               1024 to 32768 tokens, bfloat16, every backend
  hf-steer bench --level attention --shape qwen2-vl-7b --tokens 2048 --phase prefill --backend folded mask
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--level", help="attention, layer, model (default: all)", **several)
    parser.add_argument("--phase", help="prefill, decode, training (default: all)", **several)
    parser.add_argument("--shape", help="seed, qwen2-vl-2b, qwen2-vl-7b, llama-8b, llama-1b, tiny", **several)
    parser.add_argument("--dtype", help="float32, bfloat16, float16", **several)
    parser.add_argument("--tokens", type=positive, nargs="+", metavar="N", help="lengths of the prompt or the cache")
    parser.add_argument("--layers", type=positive, metavar="N", help="of whole models")
    parser.add_argument("--contenders", help="only these, beside plain and hf_steer", **several)
    parser.add_argument("--backend", help="also time these backends of hf_steer by name (default on cuda: all)", **several)
    parser.add_argument("--seconds", type=float, help="of timing per cell (default: 2, on a GPU 1; at least three rounds run)")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, 64 tokens, every level, phase and contender")
    parser.add_argument(
        "--output", type=Path, default=Path("hf_steer_bench"), metavar="DIR",
        help="for the table and the picture (default: %(default)s)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from hf_steer.evidence.plots import plot_bench

    started = time.perf_counter()
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, which measures memory, logs every start and stop
    _check(arguments)
    table = arguments.output / f"bench-{arguments.device}.csv"
    bench = _measure(arguments, table)
    files = [table, plot_bench(bench.rows, table.with_suffix(".png"))]
    seconds = time.perf_counter() - started
    if arguments.json:
        report = {"rows": bench.rows, "wrong": bench.wrong, "left_out": bench.left_out, "files": [str(path) for path in files]}
        print(json.dumps({**report, "seconds": round(seconds, 1)}))
    else:
        from hf_steer.evidence.bench.table import summary

        print(f"\n{summary(bench.rows)}")
        for line in bench.left_out:
            print(f"left out: {line}")
        for line in bench.wrong:
            print(f"WRONG: {line}")
        print(f"\n{', '.join(map(str, files))}  ({seconds:.0f} s)")
    return 1 if bench.wrong else 0


def _check(arguments: argparse.Namespace) -> None:
    """What can be refused before anything is measured."""
    import torch

    if arguments.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda; got {arguments.device!r}.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that torch can use, and it sees none; leave --device out to use the CPU.")
    if arguments.seconds is not None and not arguments.seconds >= 0:
        raise ConfigError(f"--seconds must not be negative; got {arguments.seconds}.")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {arguments.output}: {error.strerror}; choose another with --output") from error


def _measure(arguments: argparse.Namespace, table: Path) -> Bench:
    """Run it; the table is written anew after each cell."""
    from tqdm.auto import tqdm

    from hf_steer.analysis.tables import as_csv
    from hf_steer.attention import BACKENDS
    from hf_steer.evidence.bench import choose_contenders, list_cells, run_bench

    quick = arguments.quick
    cells = list_cells(
        arguments.device,
        levels=arguments.level,
        phases=arguments.phase,
        shapes=arguments.shape or (["tiny"] if quick else None),
        tokens=arguments.tokens or ([64] if quick else None),
        dtypes=arguments.dtype,
        layers=arguments.layers,
    )
    named = tuple(BACKENDS) if arguments.device == "cuda" else ("folded", "mask") if quick else ()
    seconds = arguments.seconds if arguments.seconds is not None else 0.0 if quick else _SECONDS[arguments.device]
    bar = tqdm(total=len(cells), desc="bench", unit="cell", disable=True if arguments.json else None)

    def progress(each: Any) -> Any:
        for cell in each:
            bar.set_postfix_str(f"{cell.level} {cell.shape.name} {cell.phase} {cell.batch} x {cell.tokens} {cell.dtype}")
            yield cell
            bar.update()

    with bar:
        contenders = choose_contenders(arguments.contenders, arguments.backend or named)
        return run_bench(
            cells, contenders, seconds=seconds, quick=quick, progress=progress,
            keep=lambda rows: write_whole(table, as_csv(rows).encode()),
        )  # fmt: skip


BENCH = Command("bench", "how fast steering is, beside the plain model and its rivals", DESCRIPTION, add_arguments, run)
