"""The picture of `listen.py`."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_listening(rows, path):
    """Strength against what is written of the phrase that is asked for; beside it each control."""
    rows = [row for row in rows if row["split"] == "report" and row["task"] == "three"]
    best = next(row for row in rows if row["said"] == "pointed-at")
    same = [row for row in rows if row["said"] == "pointed-at" and (row["heads"], row["normalize"], row["statement"]) ==
            (best["heads"], best["normalize"], best["statement"])]  # fmt: skip
    plain = next(row for row in rows if row["said"] == "nothing")
    curve = sorted([{**plain, "strength": 0.0}, *same], key=lambda row: row["strength"])
    bars = [plain, best, *(row for row in rows if row["said"] not in ("nothing", "pointed-at"))]
    bars += [row for row in rows if row["said"] == "pointed-at" and row not in same]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1, 1.3), layout="constrained")
    lines = {"right": "nearest to the phrase asked for", "recall": "its words written", "share": "of what is written, its words"}
    for name, label in lines.items():
        at, values = [row["strength"] for row in curve], [row[name] for row in curve]
        left.errorbar(at, values, errors_of(curve, name), marker="o", capsize=2, label=label)
    left.set(xlabel="λ", ylim=(0, 1.02), title=f"heads: {best['heads']}, pointed at: {best['statement']}")
    left.legend(fontsize=8, frameon=False)
    labels = [named(row) for row in bars]
    values = [row["right"] for row in bars]
    right.barh(range(len(bars)), values, xerr=errors_of(bars, "right"), color="tab:blue", alpha=0.7, capsize=2)
    right.set_yticks(range(len(bars)), labels, fontsize=7)
    right.invert_yaxis()
    right.set(xlim=(0, 1.02), xlabel="nearest to the phrase asked for")
    title = f"{best['model']}, three phrases in a sound, one pointed at; {best['sounds']} sounds, 95 % intervals"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def errors_of(rows, name):
    """Down and up; rounding may put an end of an interval past the value."""
    return [[max(0, row[name] - row[f"{name}_low"]) for row in rows], [max(0, row[f"{name}_high"] - row[name]) for row in rows]]


def named(row):
    if row["said"] == "nothing":
        return "unsteered"
    return f"{row['said']}: {row['heads']}, λ = {row['strength']:g}, {row['normalize']}, {row['statement']}"


def plot_ears(rows, path):
    """Word error rate and right choices of every kind and control, on phrases of the speaker and on other readers."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    sets = list(dict.fromkeys(row["sounds"] for row in rows))
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    for axis, name, label in zip(axes, ("wer", "right"), ("word error rate", "right transcript likeliest of eight"), strict=True):
        for number, title in enumerate(sets):
            own = [row for row in rows if row["sounds"] == title and name in row]
            places = [conditions.index(row["condition"]) + 0.25 * (number - 0.5) for row in own]
            axis.errorbar([row[name] for row in own], places, xerr=errors_of(own, name), fmt="o", markersize=4, capsize=2,
                          label=title)  # fmt: skip
        axis.axvline(1 if name == "wer" else 1 / 8, color="0.6", linewidth=0.8, linestyle=":")
        axis.set(xlabel=label)
        axis.set_xlim(left=0)
    axes[0].set_yticks(range(len(conditions)), conditions, fontsize=8)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
