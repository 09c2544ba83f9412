"""The table of a sweep, and what is read back from one that was cut short."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_steer.analysis.provenance import Provenance
from hf_steer.analysis.tables import as_csv, as_text
from hf_steer.errors import FileError

_WIDTH = 100
"""Characters of an answer in print."""


@dataclass(frozen=True)
class SweepRow:
    """One strength, over all prompts.

    Attributes:
        strength: λ of the steered heads.
        entropy_reduction_percent: of the attention, mean over the steered heads.
        attention_kl_nats: KL(unsteered ‖ steered) of the attention, likewise.
        unsteered_span_mass: share of attention on the span, which is what is pointed at unless another was asked for, likewise;
            None without a span.
        span_mass: likewise, steered.
        answers_changed_share: of the prompts, those whose greedy continuation differs from the unsteered one.
        tokens_changed_share: of a continuation's positions, those whose token differs; mean over prompts.
        kl_nats: KL(unsteered ‖ steered) of the next token along the unsteered continuation; see `measure_retention`.
        task_score: mean of the task's scores; None without a task.
        task_low: lower end of its 95 % bootstrap interval, over prompts.
        task_high: upper end.
        prompts: how many.
        answers: what each prompt is answered: texts where a `decode` was given, else token numbers with spaces between them.
        provenance: where these numbers come from.
    """

    strength: float
    entropy_reduction_percent: float
    attention_kl_nats: float
    unsteered_span_mass: float | None
    span_mass: float | None
    answers_changed_share: float
    tokens_changed_share: float
    kl_nats: float
    task_score: float | None
    task_low: float | None
    task_high: float | None
    prompts: int
    answers: tuple[str, ...]
    provenance: Provenance

    def flat(self) -> dict[str, Any]:
        """Column -> value, the provenance's columns last."""
        values = dataclasses.asdict(self)
        origin = values.pop("provenance")
        return {**values, **origin}


@dataclass(frozen=True)
class Sweep:
    """The table, in the order in which the strengths were given."""

    rows: tuple[SweepRow, ...]

    def to_csv(self) -> str:
        """A header, then a line per strength, with where it comes from."""
        return as_csv([{**row.flat(), "answers": json.dumps(row.answers, ensure_ascii=False)} for row in self.rows])

    def answers_text(self, prompts: int = 3) -> str:
        """What the first few prompts are answered at each strength, a line each."""
        lines = []
        for number in range(min(prompts, len(self.rows[0].answers) if self.rows else 0)):
            lines.append(f"prompt {number}")
            lines += [f"  λ = {f'{row.strength:g}':<6}{shortened(row.answers[number])}" for row in self.rows]
        return "\n".join(lines)

    def __repr__(self) -> str:
        strengths = ", ".join(f"{row.strength:g}" for row in self.rows)
        return f"<Sweep: λ = {strengths} on {self.rows[0].prompts if self.rows else 0} prompts>"

    def __str__(self) -> str:
        return as_text([{short: getattr(row, name) for name, short in _SHORT.items()} for row in self.rows])


def shortened(answer: str, width: int = _WIDTH) -> str:
    """An answer on one line."""
    text = " ".join(answer.split())
    return repr(text if len(text) <= width else f"{text[: width - 4]} ...")


_SHORT = {
    "strength": "λ",
    "task_score": "task",
    "task_low": "low",
    "task_high": "high",
    "answers_changed_share": "answers changed",
    "tokens_changed_share": "tokens changed",
    "kl_nats": "KL (nats)",
    "attention_kl_nats": "attention KL",
    "entropy_reduction_percent": "entropy reduced by %",
    "unsteered_span_mass": "unsteered mass",
    "span_mass": "mass",
}
"""Column -> its name in print, in the order of print."""


_SAME = ("model", "model_type", "config_hash", "inputs_hash", "seed")
"""Columns in which a sweep that is gone on with agrees with the one that was cut short."""


def read_finished(path: Path, origin: Provenance, *, scored: bool) -> dict[float, SweepRow]:
    """Strength -> row, of what a CSV holds already; nothing when it is not there.

    Args:
        path: of the CSV.
        origin: of what is to be measured now.
        scored: whether a task scores it.

    Raises:
        FileError: not the table of a sweep, or of another one.
    """
    if not path.exists():
        return {}
    try:
        rows = [_read_row(line) for line in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))]
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"{path} is not the table of a sweep, or of one by another version ({error}). Give another path=, or move it away."
        ) from error
    for row in rows:
        pairs = {name: (getattr(row.provenance, name), getattr(origin, name)) for name in _SAME}
        pairs["task"] = ("scored" if row.task_score is not None else "none", "scored" if scored else "none")
        others = [f"{name} {there!r}, now {now!r}" for name, (there, now) in pairs.items() if there != now]
        if others:
            raise FileError(
                f"{path} holds another sweep, with {'; '.join(others)}. Give another path=, or move the file away to start anew."
            )
    return {row.strength: row for row in rows}


def _read_row(line: Mapping[str, str]) -> SweepRow:
    own = {item.name: _value(line[item.name], str(item.type)) for item in dataclasses.fields(SweepRow)[:-1]}
    origin = {item.name: _value(line[item.name], str(item.type)) for item in dataclasses.fields(Provenance)}
    return SweepRow(**own, provenance=Provenance(**origin))


def _value(text: str, kind: str) -> Any:
    """A field back from the text that it was written as; `kind` is its annotation."""
    if text == "" and kind.endswith("None"):
        return None
    if kind.startswith("tuple"):
        return tuple(map(str, json.loads(text)))
    return {"float": float, "int": int, "str": str}[kind.removesuffix(" | None")](text)
