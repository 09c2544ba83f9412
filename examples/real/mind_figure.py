"""The picture of the table: who is named, by condition, and what the aligners add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_steer.evidence.pointing import wilson_interval

Row = Mapping[str, Any]


def pooled(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row for each condition at its chosen λ; random sets are taken together."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["table"] == "pointing" and row["chosen"]:
            groups.setdefault(row["condition"], []).append(row)
    shown = []
    for name, own in groups.items():
        total = sum(row["n"] for row in own)
        hits = round(sum(row["right"] * row["n"] for row in own))
        low, high = wilson_interval(hits, total)
        shown.append({"condition": name, "right": hits / total, "low": low, "high": high, "strength": own[0]["strength"]})
    return shown


def reach(rows: Sequence[Row]) -> list[list[float]]:
    """How far the intervals go down and up from the shares."""
    down, up = ("right_low", "right_high") if "right_low" in rows[0] else ("low", "high")
    return [[max(0.0, row["right"] - row[down]) for row in rows], [max(0.0, row[up] - row["right"]) for row in rows]]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the figure: shares with 95 % intervals."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.6), layout="constrained", width_ratios=(1.25, 1, 1.1))
    shown = pooled(rows)[::-1]
    shares = [row["right"] for row in shown]
    left.barh(range(len(shown)), shares, xerr=reach(shown), color="tab:blue", capsize=2, height=0.7)
    labels = [f"{row['condition']}, λ = {row['strength']:g}" if row["strength"] else row["condition"] for row in shown]
    left.set_yticks(range(len(shown)), labels, fontsize=7)
    left.axvline(0.25, color="0.5", linewidth=0.8, linestyle=":")
    left.set(xlim=(0, 1), xlabel="names the one that is asked for")
    for start, label in (("all heads", "all heads"), ("found heads (", "found heads")):
        grid = [row for row in rows if row["table"] == "pointing" and row["condition"].startswith(start)]
        grid = [row for row in grid if "," not in row["condition"]]
        own, strengths = [row["right"] for row in grid], [row["strength"] for row in grid]
        line = middle.errorbar(strengths, own, yerr=reach(grid), marker="o", markersize=4, capsize=2, label=label)
        readable = [row["readable"] for row in grid]
        middle.plot(strengths, readable, color=line[0].get_color(), linestyle="--", linewidth=0.8)
    middle.set(xlabel="λ", ylabel="right (dashed: readable)", ylim=(0, 1.02))
    middle.legend(frameon=False, fontsize=8)
    aligners = [row for row in rows if row["table"] == "aligners"]
    tasks = list(dict.fromkeys(row["condition"].partition(": ")[2] for row in aligners))
    kinds = list(dict.fromkeys(row["condition"].partition(": ")[0] for row in aligners))
    for number, kind in enumerate(kinds):
        own = [row for row in aligners if row["condition"].startswith(f"{kind}: ")]
        places = [place + (number - len(kinds) / 2 + 0.5) * 0.2 for place in range(len(tasks))]
        right.bar(places, [row["right"] for row in own], yerr=reach(own), width=0.2, capsize=2, label=kind)
    right.set_xticks(range(len(tasks)), tasks)
    right.set(ylim=(0, 1), ylabel="right")
    right.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
