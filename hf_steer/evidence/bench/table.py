"""One row per cell and contender: what was measured, on what, and whether its bars hold."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from hf_steer.evidence.bench.bars import judge, missed_bars
from hf_steer.evidence.bench.cells import Cell
from hf_steer.evidence.bench.contenders import OURS
from hf_steer.evidence.bench.timing import FLOOR, Spread, Times, paired_ratios, spread

Row = dict[str, Any]

COLUMNS = (
    "level", "shape", "phase", "batch", "tokens", "dtype", "layers", "contender", "rounds", "ms", "ms_p20", "ms_p80",
    "ratio", "ratio_p20", "ratio_p80", "times_ours", "times_triton", "added_ms", "peak_mb", "peak_ratio", "memory_growth",
    "error_ratio", "bar", "holds", "kind", "device", "threads", "torch", "transformers", "hf_steer", "python", "platform", "date",
)  # fmt: skip
"""Of the CSV. Times are in milliseconds with their 20th and 80th percentile; `ratio` is over the plain model, `times_ours` over
hf_steer, `times_triton` over hf_steer's triton backend, each the median of the rounds' own ratios; `added_ms` is per layer above
plain; `peak_mb` is of a call above what was there before; `memory_growth` is the exponent of peak_mb between this length and
the next shorter one (1 linear, 2 quadratic); `error_ratio` is the error in units of the plain model's own."""

_TRITON = f"{OURS} triton"
_MB = 1e6


def conditions(kind: str) -> Row:
    """What every row says of the machine and the versions."""
    from hf_steer import __version__

    return {
        "kind": kind,
        "device": torch.cuda.get_device_name() if kind == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_steer": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    """The CPU's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cell_rows(cell: Cell, times: Times, peaks: dict[str, int], errors: dict[str, float]) -> list[Row]:
    """The rows of one cell, without conditions and without what needs other cells."""
    rows = []
    for name, taken in times.items():
        ratio = spread(paired_ratios(times, name))
        added = [mine - base for mine, base in zip(taken, times[FLOOR], strict=False)]
        rows.append(
            {
                "level": cell.level, "shape": cell.shape.name, "phase": cell.phase, "batch": cell.batch, "tokens": cell.tokens,
                "dtype": cell.dtype, "layers": cell.layers, "contender": name, "rounds": len(taken),
                **_spread_columns("ms", spread(taken)), **_spread_columns("ratio", ratio),
                "times_ours": _times(times, name, OURS), "times_triton": _times(times, name, _TRITON),
                "added_ms": float(np.median(added)) / cell.layers, "peak_mb": peaks[name] / _MB,
                "peak_ratio": peaks[name] / peaks[FLOOR] if peaks[FLOOR] else None, "memory_growth": None,
                "error_ratio": errors.get(name),
            }
        )  # fmt: skip
    return rows


def patching_row(shape: Any, taken: list[float], peak: int) -> Row:
    """The row of the patching's own cost."""
    blank = dict.fromkeys(COLUMNS[: COLUMNS.index("bar")])
    return {
        **blank, "level": "patching", "shape": shape.name, "phase": "set-up", "batch": 0, "tokens": 0, "dtype": "bfloat16",
        "layers": shape.layers, "contender": OURS, "rounds": len(taken), **_spread_columns("ms", spread(taken)),
        "peak_mb": peak / _MB,
    }  # fmt: skip


def finished(rows: Sequence[Row], kind: str) -> list[Row]:
    """Rows with growth of memory, bars and conditions, their columns in the CSV's order."""
    around = conditions(kind)
    full = []
    for row in rows:
        known = {**row, "memory_growth": _growth(row, rows), **around}
        known["bar"], known["holds"] = judge(known)
        full.append({name: known[name] for name in COLUMNS})
    return full


def summary(rows: Iterable[Row]) -> str:
    """A line per cell and contender, then which bars are missed."""
    lines, last = [], None
    for row in rows:
        place = tuple(row[name] for name in ("level", "shape", "phase", "batch", "tokens", "dtype", "layers"))
        if place != last:
            level, shape, phase, batch, tokens, dtype, layers = place
            lines.append(f"\n{level}, {shape}, {phase}, batch {batch}, {tokens} tokens, {dtype}, {layers} layer(s)")
            last = place
        lines.append(_line(row))
    judged = [row for row in rows if row["holds"] is not None]
    held = sum(row["holds"] for row in judged)
    lines.append(f"\n{held} of {len(judged)} rows with bars keep them.")
    lines += [f"missed: {_name(row)}: {_found(row)}" for row in judged if not row["holds"]]
    return "\n".join(lines).lstrip("\n")


def _line(row: Row) -> str:
    text = f"  {row['contender']:<20}{row['ms']:>12.3f} ms"
    if row["ratio"] is not None:
        text += f"{row['ratio']:>9.3f} x  [{row['ratio_p20']:.3f}, {row['ratio_p80']:.3f}]"
    text += f"{row['peak_mb']:>11.1f} MB"
    if row["error_ratio"] is not None:
        text += f"  error {row['error_ratio']:.2f}"
    if row["holds"] is not None:
        text += f"  {row['bar']} {'holds' if row['holds'] else 'MISSED'}"
    return text


def _name(row: Row) -> str:
    return " ".join(str(row[name]) for name in ("contender", "level", "shape", "phase", "batch", "tokens", "dtype"))


def _found(row: Row) -> str:
    """The bars that a row misses, and whether the middle 60 % of the rounds reach them."""
    parts = []
    for bar in missed_bars(row):
        noisy = bar.quantity == "ratio" and row["ratio_p20"] <= bar.limit
        parts.append(f"{bar}, but is {row[bar.quantity]:.3f}{' (the interval reaches it)' if noisy else ''}")
    return "; ".join(parts)


def _spread_columns(name: str, found: Spread) -> Row:
    return {name: found.median, f"{name}_p20": found.p20, f"{name}_p80": found.p80}


def _times(times: Times, name: str, floor: str) -> float | None:
    return spread(paired_ratios(times, name, floor)).median if floor in times else None


def _growth(row: Row, rows: Sequence[Row]) -> float | None:
    """Exponent of the peak memory between the next shorter length and this one."""
    same = ("level", "shape", "phase", "batch", "dtype", "layers", "contender")
    shorter = [
        other for other in rows if other["tokens"] < row["tokens"] and all(other[name] == row[name] for name in same)
    ]
    if not shorter:
        return None
    other = max(shorter, key=lambda found: int(found["tokens"]))
    if other["peak_mb"] <= 0 or row["peak_mb"] <= 0:
        return None
    return math.log(row["peak_mb"] / other["peak_mb"]) / math.log(row["tokens"] / other["tokens"])
