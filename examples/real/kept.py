"""What a run keeps: the result of every step, so that one that was stopped goes on, and a table that says where it comes from."""

from __future__ import annotations

import csv
import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_steer


def kept(folder: Path, name: str, make: Callable[[], Any]) -> dict[str, Any]:
    """What a step returned, now or in a run before, and how long it took; written whole or not at all."""
    path = folder / f"{name}.json"
    if not path.is_file():
        started, cpu = time.perf_counter(), time.process_time()
        found = {"value": make(), "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(found))
        unfinished.replace(path)
    return json.loads(path.read_text())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], run: str) -> None:
    """All rows, with where they come from.

    Args:
        path: of the table.
        rows: with columns of their own.
        run: what tells this run's inputs from those of others.
    """
    source = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "hf_steer": hf_steer.__version__,
        "torch": torch.__version__, "transformers": transformers.__version__, "run": run,
    }  # fmt: skip
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *source], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            full = {**row, **source}
            writer.writerow({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in full.items()})
