"""The benchmark: cell by cell, verify, then time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch

from hf_steer.errors import SteerError
from hf_steer.evidence.bench.attention_stage import AttentionStage
from hf_steer.evidence.bench.cells import Cell
from hf_steer.evidence.bench.contenders import OURS, Contender
from hf_steer.evidence.bench.decoder_stage import DecoderStage
from hf_steer.evidence.bench.setup_cost import patching_costs
from hf_steer.evidence.bench.shapes import make_model
from hf_steer.evidence.bench.table import Row, cell_rows, finished, patching_row
from hf_steer.evidence.bench.timing import FLOOR, Call, cpu_clock, cuda_clock, peak_bytes, time_in_turns
from hf_steer.evidence.bench.verify import Stage, Verifier

_VERIFIED_TOKENS = 96
_VERIFIED_LAYERS = 2
_ROOM = 0.6
"""Share of the free memory that a rival's queries × keys may take."""


@dataclass
class Bench:
    """What a run found.

    Attributes:
        rows: by `table.COLUMNS`.
        wrong: contenders that miss the error budget, as sentences; they are timed all the same.
        left_out: contenders that did not run, and why.
    """

    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def run_bench(
    cells: Sequence[Cell],
    contenders: Sequence[Contender],
    *,
    seconds: float,
    progress: Callable[[Sequence[Any]], Any] = iter,
    keep: Callable[[list[Row]], object] = len,
) -> Bench:
    """Run all cells, and patch a model without weights.

    Args:
        cells: of `list_cells`; all on one device.
        contenders: of `choose_contenders`.
        seconds: of timing per cell, beyond the first three rounds.
        progress: wraps the cells, as tqdm does.
        keep: is handed all rows so far after each cell, so that a run that is cut short has not been for nothing.
    """
    bench, models = Bench(), Models()
    ready = [row for row in contenders if row.missing is None]
    bench.left_out += [row.missing for row in contenders if row.missing is not None]
    rows: list[Row] = []
    known: dict[tuple[Cell, str], float] = {}
    for cell in progress(cells):
        rows += _measure(cell, ready, models, known, bench, seconds)
        bench.rows = finished(rows, cell.device)
        keep(bench.rows)
    rows.append(patching_row(*patching_costs()))
    bench.rows = finished(rows, cells[0].device)
    keep(bench.rows)
    return bench


def _measure(
    cell: Cell, contenders: Sequence[Contender], models: Models, known: dict[tuple[Cell, str], float], bench: Bench, seconds: float
) -> list[Row]:
    """One cell: verify, take the memory of a first call, time in turns."""
    entered = [row for row in contenders if row.enters(cell) and _fits(row, cell, bench)]
    errors = _verify(cell, entered, models, known, bench)
    calls = dict(_calls(_stage(cell, models), [row for row in entered if row.name in errors], bench))
    peaks = dict(_peaks(calls, cell, bench))
    clock = cuda_clock if cell.device == "cuda" else cpu_clock
    times = time_in_turns({name: calls[name] for name in peaks}, clock, seconds=seconds)
    return cell_rows(cell, times, peaks, errors)


class Models:
    """The last model that was timed and the last that was verified, since neighbouring cells share them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Any] = {}

    def get(self, cell: Cell) -> Any:
        """The plain model of a cell."""
        place = (cell.shape, cell.layers, cell.dtype)
        if place not in self._kept:
            verified = (cell.shape, min(cell.layers, _VERIFIED_LAYERS), cell.dtype)
            self._kept = {kept: model for kept, model in self._kept.items() if kept == verified}
            self._kept[place] = make_model(cell.shape, layers=cell.layers, dtype=cell.torch_dtype, device=cell.device)
        return self._kept[place]


def _stage(cell: Cell, models: Models, *, verified: bool = False) -> Stage:
    if cell.level == "attention":
        return AttentionStage(cell)
    return DecoderStage(cell, models.get(cell), every_logit=verified)


def _verify(
    cell: Cell, contenders: Sequence[Contender], models: Models, known: dict[tuple[Cell, str], float], bench: Bench
) -> dict[str, float]:
    """Name -> error ratio, of those that run at all; by what was found before where the same cell is verified again."""
    checked = _checked_cell(cell)
    if not all((checked, row.name) in known for row in contenders):
        stage = _stage(checked, models, verified=True)
        calls = dict(_calls(stage, contenders, bench))
        verifier = Verifier(stage, calls[FLOOR])
        for row in contenders:
            if row.name in calls:
                ratio = _attempt(row, cell, partial(verifier.error_ratio, row, calls[row.name]), bench)
                if ratio is not None:
                    known[checked, row.name] = ratio
                    bench.wrong += _over_budget(row, checked, ratio)
    return {row.name: known[checked, row.name] for row in contenders if (checked, row.name) in known}


def _over_budget(row: Contender, cell: Cell, ratio: float) -> Iterator[str]:
    if not ratio <= row.budget:
        where = f"{cell.level}, {cell.shape.name}, {cell.phase}, batch {cell.batch}, {cell.tokens} tokens, {cell.dtype}"
        yield f"{row.name} ({where}): its error is {ratio:.1f} times the plain model's own; allowed are {row.budget:g}."


def _checked_cell(cell: Cell) -> Cell:
    """Attention alone is verified as it is timed, training and whole models at a size that float64 can do."""
    if cell.level == "attention" and cell.phase != "training":
        return cell
    return dataclasses.replace(
        cell,
        tokens=min(cell.tokens, _VERIFIED_TOKENS), batch=min(cell.batch, 2), layers=min(cell.layers, _VERIFIED_LAYERS),
    )  # fmt: skip


def _calls(stage: Stage, contenders: Sequence[Contender], bench: Bench) -> Iterator[tuple[str, Call]]:
    for row in contenders:
        make = row.attention if isinstance(stage, AttentionStage) else row.decoder
        call = None if make is None else _attempt(row, stage.cell, partial(make, stage), bench)
        if call is not None:
            yield row.name, call


def _peaks(calls: dict[str, Call], cell: Cell, bench: Bench) -> Iterator[tuple[str, int]]:
    for name, call in calls.items():
        try:
            yield name, peak_bytes(call, cell.device)
        except torch.OutOfMemoryError:
            if name in (FLOOR, OURS):
                raise
            _leave_out(bench, f"{name} ({cell.level}, {cell.shape.name}, {cell.tokens} tokens): out of memory")


def _attempt(row: Contender, cell: Cell, act: Callable[[], Any], bench: Bench) -> Any:
    """What it gives, or None and a line in `left_out` where a contender cannot run."""
    if row.name in (FLOOR, OURS):
        return act()
    try:
        return act()
    except (SteerError, torch.OutOfMemoryError) as error:
        reason = f"cannot run: {error}"
    except Exception as error:  # a foreign package may fail in any way; that must not end the benchmark
        if row.requires is None:
            raise
        reason = f"installed, but cannot run: {type(error).__name__}: {error}"
    _leave_out(bench, f"{row.name} ({cell.level}, {cell.phase}): {reason.splitlines()[0]}")
    return None


def _fits(row: Contender, cell: Cell, bench: Bench) -> bool:
    """Whether its queries × keys fit into the free memory."""
    held = row.copies * cell.scores_bytes * (cell.layers if cell.phase == "training" else 1)
    free = psutil.virtual_memory().available
    if cell.device == "cuda":  # what torch keeps of freed tensors is free, too
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if held <= _ROOM * free:
        return True
    _leave_out(
        bench,
        f"{row.name} ({cell.level}, {cell.shape.name}, {cell.phase}, {cell.tokens} tokens, {cell.dtype}): "
        f"needs {held / 1e9:.0f} GB, {free / 1e9:.0f} GB are free",
    )
    return False


def _leave_out(bench: Bench, line: str) -> None:
    if line not in bench.left_out:
        bench.left_out.append(line)
