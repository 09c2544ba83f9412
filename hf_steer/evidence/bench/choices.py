"""What a run measures when it is not told otherwise: everything, or the few cells that say what steering costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from hf_steer.attention import BACKENDS
from hf_steer.evidence.bench.cells import Cell, list_cells
from hf_steer.evidence.bench.contenders import Contender, choose_contenders


@dataclass(frozen=True)
class Choice:
    """The settings of a run; None is what `list_cells` and `choose_contenders` take by themselves.

    Attributes:
        seconds: of timing per cell, beyond the first three rounds.
        levels: of `cells.LEVELS`.
        phases: of `cells.PHASES`.
        shapes: of `shapes.SHAPES`.
        tokens: lengths of the prompt or the cache.
        dtypes: of `cells.DTYPES`.
        layers: of whole models.
        contenders: of `contenders.CONTENDERS`, beside plain and ours.
        backends: of ours, timed by name.
        batches: sizes that are timed, of those that a phase has.
    """

    seconds: float
    levels: tuple[str, ...] | None = None
    phases: tuple[str, ...] | None = None
    shapes: tuple[str, ...] | None = None
    tokens: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    layers: int | None = None
    contenders: tuple[str, ...] | None = None
    backends: tuple[str, ...] = ()
    batches: tuple[int, ...] | None = None

    def cells(self, device: str) -> tuple[Cell, ...]:
        """In the order in which they run; ConfigError for a name that is not known."""
        found = list_cells(
            device, levels=self.levels, phases=self.phases, shapes=self.shapes, tokens=self.tokens, dtypes=self.dtypes,
            layers=self.layers,
        )  # fmt: skip
        return tuple(cell for cell in found if self.batches is None or cell.batch in self.batches)

    def rows(self) -> tuple[Contender, ...]:
        """Who is timed; ConfigError for a name that is not known."""
        return choose_contenders(self.contenders, self.backends)


FULL: Mapping[str, Choice] = MappingProxyType({"cpu": Choice(2.0), "cuda": Choice(1.0, backends=tuple(BACKENDS))})
"""By device: everything, a quarter of an hour on two cores."""
_FEW = Choice(
    1.0, ("attention", "model"), ("prefill", "decode"), ("qwen2-vl-2b",), (1024,), ("float32",), 1,
    ("hf_steer disabled", "dense mask"), batches=(1,),
)  # fmt: skip
QUICK: Mapping[str, Choice] = MappingProxyType(
    {"cpu": _FEW, "cuda": replace(_FEW, tokens=(4096,), dtypes=("bfloat16",), layers=None)}
)
"""By device: half a minute on two cores, and one screen."""
