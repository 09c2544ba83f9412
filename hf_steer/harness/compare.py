"""One model through a harness twice, plain and steered: what steering gains where it decides, and what it costs elsewhere."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hf_steer.files import write_whole

TASKS = Path(__file__).parent / "tasks"
OURS = ("hf_steer_reports", "hf_steer_ability")
NAME = "harness.csv"


@dataclass(frozen=True)
class Score:
    """One task, once.

    Attributes:
        task: its name.
        steered: whether documents were steered where they point.
        accuracy: share of right choices.
        stderr: of that, as the harness computes it.
        documents: how many.
    """

    task: str
    steered: bool
    accuracy: float
    stderr: float
    documents: int


def compare(lm: Any, tasks: Sequence[str] = OURS, *, limit: int | None = None, include_path: Path = TASKS) -> tuple[Score, ...]:
    """Run tasks steered and plain.

    Args:
        lm: a `model.SteeredLM`.
        tasks: names that the harness knows, or finds in `include_path`; of the metric `acc`.
        limit: documents of each; all when None.
        include_path: folder with tasks of one's own.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    scores = []
    for steers in (False, True):
        lm.steers = steers
        manager = TaskManager(include_path=str(include_path))
        found = simple_evaluate(lm, tasks=list(tasks), limit=limit, task_manager=manager)
        for task in tasks:
            own = found["results"][task]
            count = found["n-samples"][task]["effective"]
            scores.append(Score(task, steers, float(own["acc,none"]), float(own["acc_stderr,none"]), int(count)))
    return tuple(scores)


def write_scores(scores: Sequence[Score], folder: Path) -> Path:
    """The table as CSV, a header first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(Score)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(score) for score in scores)
    write_whole(folder / NAME, text.getvalue().encode())
    return folder / NAME
