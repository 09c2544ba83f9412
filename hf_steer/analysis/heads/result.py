"""What was found, as one frozen value: a table to read, JSON and CSV to keep."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_steer.analysis.heads.origin import HeadProvenance
from hf_steer.analysis.heads.report import BASELINES, Estimate, HeadReport
from hf_steer.analysis.heads.selection import Head, by_layer
from hf_steer.errors import ConfigError
from hf_steer.files import write_whole

_SHOWN = 8
"""Heads in the printed table; more where more are chosen."""
Table = tuple[tuple[float | None, ...], ...]
"""`(layers, heads)`; None where a head was not tried."""


@dataclass(frozen=True)
class HeadResult:
    """Heads that ground, or that none were found.

    Attributes:
        rule: how the heads were chosen.
        chosen: `(layer, head)`, the best first.
        scores: name -> `(layers, heads)` table: see `attention_scores`; `effect`, the mean change of log p(answer) in nats when
            the head alone is steered; `forward`, the share of right answers of the set with this head, in the round of forward
            selection in which it was chosen or else in the last.
        rankings: rule -> all heads, the best first; for the rules whose scores were computed.
        report: the chosen heads on examples that did not choose them.
        strength: λ with which heads were steered.
        examples: how many examples chose the heads.
        provenance: on what they were found; None in files of versions that did not note it.
    """

    rule: str
    chosen: tuple[Head, ...]
    scores: Mapping[str, Table]
    rankings: Mapping[str, tuple[Head, ...]]
    report: HeadReport
    strength: float
    examples: int
    provenance: HeadProvenance | None = dataclasses.field(default=None, compare=False)

    @property
    def heads(self) -> dict[int, tuple[int, ...]]:
        """The chosen heads by layer, for `AttentionConfig(heads=...)`."""
        return by_layer(self.chosen)

    @property
    def found(self) -> bool:
        """Whether, on the report's examples, they beat random heads of their own layers and the baseline."""
        return self.report.reason is None

    @property
    def verdict(self) -> str:
        return "found" if self.found else f"none found: {self.report.reason}"

    def to_json(self) -> str:
        """`from_json` gives an equal object back; `heads`, `found` and `verdict` are written for whoever reads the file."""
        values = dataclasses.asdict(self)
        values |= {"heads": {str(layer): own for layer, own in self.heads.items()}, "found": self.found, "verdict": self.verdict}
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> HeadResult:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: not JSON, or keys other than its own.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"this is not JSON ({error}); it is truncated or foreign.") from error
        noted = values.setdefault("provenance", None) if isinstance(values, dict) else None
        own = _checked("a result", values, cls, ("heads", "found", "verdict"))
        report = _checked("report", own["report"], HeadReport, ())
        for name in ("chosen", "over_same_layers", "over_all_heads", "over_baseline"):
            if report[name] is not None:
                report[name] = Estimate(**_checked(f"report.{name}", report[name], Estimate, ()))
        parts: dict[str, Any] = {"report": HeadReport(**_tuples(report))}
        if noted is not None:
            parts["provenance"] = HeadProvenance(**_checked("provenance", noted, HeadProvenance, ()))
        result = cls(**{**{name: _tuples(value) for name, value in own.items()}, **parts})
        if _tuples(values["heads"]) != {str(layer): heads for layer, heads in result.heads.items()}:
            raise ConfigError(f"heads {values['heads']} are not the chosen ones, {result.heads}; was the file edited?")
        return result

    def to_csv(self) -> str:
        """One line per head: layer, head, whether it is chosen, and its scores."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["layer", "head", "chosen", *self.scores])
        for layer, head in sorted(self.rankings[self.rule]):
            writer.writerow([layer, head, int((layer, head) in self.chosen), *self._scores_of((layer, head))])
        return text.getvalue()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON, whole or not at all.

        Returns:
            The path.
        """
        target = Path(path)
        write_whole(target, self.to_json().encode())
        return target

    def __repr__(self) -> str:
        report = self.report
        return (
            f"<HeadResult: {'found' if self.found else 'none found'}, heads={self.heads} by {self.rule!r} on {self.examples} "
            f"examples; {report.measure} {report.chosen} against {report.baseline:.2f} on {report.examples} others>"
        )

    def __str__(self) -> str:
        report, counted = self.report, {"answers": "right answers", "pointing": "most attended token in the span"}
        lines = [
            f"{self.verdict}",
            f"AttentionConfig(heads={self.heads}), chosen by {self.rule!r} on {self.examples} examples, λ = {self.strength:g}",
            "",
            f"{f'{counted[report.measure]}, {report.examples} other examples':<58}share",
            f"{'the chosen heads':<58}{report.chosen}",
            f"{BASELINES[report.measure]:<58}{report.baseline:.2f}",
            _null_line("random heads, as many in the same layers", report.same_layers),
            _null_line("random heads, as many from anywhere", report.all_heads),
            f"{'gain over random heads of the same layers':<58}{report.over_same_layers or 'no such sets'}",
            f"{'gain over random heads from anywhere':<58}{report.over_all_heads or 'no such sets'}",
            f"{f'gain over {BASELINES[report.measure]}':<58}{report.over_baseline}",
            "",
            f"{'layer, head':<14}" + "".join(f"{name:>14}" for name in self.scores),
        ]
        ranking = self.rankings[self.rule]
        shown = min(len(ranking), max(_SHOWN, len(self.chosen)))
        for layer, head in ranking[:shown]:
            marked = " *" if (layer, head) in self.chosen else ""
            cells = ("" if value is None else f"{value:.3f}" for value in self._scores_of((layer, head)))
            lines.append(f"{f'{layer}, {head}{marked}':<14}" + "".join(f"{cell:>14}" for cell in cells))
        return "\n".join([*lines, f"* chosen; {len(ranking) - shown} more heads in scores"])

    def _scores_of(self, place: Head) -> list[float | None]:
        return [table[place[0]][place[1]] for table in self.scores.values()]


def _null_line(title: str, shares: Sequence[float]) -> str:
    found = f"{sum(shares) / len(shares):.2f} on average ({min(shares):.2f} to {max(shares):.2f})" if shares else "none"
    return f"{f'{title} ({len(shares)} sets)':<58}{found}"


def _checked(name: str, values: Any, kind: type, further: Sequence[str]) -> dict[str, Any]:
    """The values of a dataclass; ConfigError unless its keys, and the further ones, are there and no others."""
    wanted = [item.name for item in dataclasses.fields(kind)]
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must be a mapping; got {type(values).__name__}.")
    missing, unknown = {*wanted, *further} - set(values), set(values) - {*wanted, *further}
    if missing or unknown:
        raise ConfigError(f"{name}: missing {sorted(missing)}, unknown {sorted(unknown)}; it has {', '.join([*wanted, *further])}.")
    return {key: values[key] for key in wanted}


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
