"""One screen: what steering costs, a line per cell and a column per contender."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_steer.evidence.bench.table import Row
from hf_steer.evidence.bench.timing import FLOOR

_VARIES = ("shape", "tokens", "dtype", "batch")


def screen(rows: Sequence[Row]) -> str:
    """The rows of a few cells, for people: times plain's time with the middle 60 % of the rounds, memory, errors.

    Args:
        rows: of `run_bench`, the patching's own among them.
    """
    timed, patching = rows[:-1], rows[-1]
    names = list(dict.fromkeys(row["contender"] for row in timed if row["contender"] != FLOOR))
    varies = [name for name in _VARIES if len({row[name] for row in timed}) > 1]
    cells: dict[str, dict[str, Row]] = {}
    for row in timed:
        title = ", ".join([row["level"], row["phase"], *(_said(row, name) for name in varies)])
        cells.setdefault(title, {})[row["contender"]] = row
    worst = {name: max(row["error_ratio"] for row in timed if row["contender"] == name) for name in names}
    return "\n".join(
        [
            f"{patching['device']}, {patching['threads']} threads, torch {patching['torch']}",
            f"Every head of every layer steered: {', '.join(_said(timed[0], name) for name in _VARIES if name not in varies)}, "
            f"{max(row['layers'] for row in timed)} layer(s).",
            "",
            *_block("times plain's time", cells, names, lambda row: f"{row['ms']:.1f} ms", _ratio),
            "",
            *_block("memory of a call", cells, names, _memory, _memory),
            "",
            "error against float64 (plain's own is 1): "
            + ", ".join(f"{name} {error:.1f}" for name, error in worst.items()),
            f"patching a {patching['shape']} of {patching['layers']} layers takes {patching['ms']:.1f} ms",
        ]
    )


def _block(
    title: str, cells: dict[str, dict[str, Row]], names: Sequence[str], floor: Callable[[Row], str], show: Callable[[Row], str]
) -> list[str]:
    width = max(map(len, (title, *cells)))
    lines = [(title, FLOOR, list(names))]
    for place, found in cells.items():
        lines.append((place, floor(found[FLOOR]), [show(found[name]) if name in found else "" for name in names]))
    return [f"{place:<{width}}{first:>12}" + "".join(f"{column:>21}" for column in columns) for place, first, columns in lines]


def _said(row: Row, name: str) -> str:
    value: Any = row[name]
    return {"tokens": f"{value} tokens", "batch": f"batch {value}"}.get(name, str(value))


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.2f} [{row['ratio_p20']:.2f}, {row['ratio_p80']:.2f}]"


def _memory(row: Row) -> str:
    return f"{row['peak_mb']:.1f} MB"
