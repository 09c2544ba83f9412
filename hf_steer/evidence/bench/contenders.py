"""Who is timed: a row per contender."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_steer.attention import BACKENDS
from hf_steer.errors import ConfigError
from hf_steer.evidence.bench import attention_stage, decoder_calls, rivals
from hf_steer.evidence.bench.cells import PHASES, Cell
from hf_steer.evidence.bench.timing import FLOOR, Call

OURS = "hf_steer"
KERNEL_BUDGET = 4.0
"""A kernel that adds a bias rounds once more and sums in another order. A bias that is forgotten is off by hundreds."""
EAGER_BUDGET = 10.0
"""Eager attention rounds logits and weights to the model's type, where fused kernels keep float32."""
Maker = Callable[[Any], Call]


@dataclass(frozen=True)
class Contender:
    """One way to attend.

    Attributes:
        name: in tables.
        attention: makes its call from an `AttentionStage`; None where it has none.
        decoder: makes its call from a `DecoderStage`, for the levels in `decoder_levels`.
        decoder_levels: `"layer"`, `"model"` or both.
        steers: whether it carries the bias; otherwise it has to give what the plain model gives.
        flat: its bias is the same all over the image.
        budget: its error may be this many times the plain model's own.
        copies: heads × queries × keys tensors that it holds at once; what would not fit is left out.
        phases: that it can run.
        family: of the shapes that it can run; None for all.
        requires: an optional package.
    """

    name: str
    attention: Maker | None
    decoder: Maker
    decoder_levels: tuple[str, ...] = ("layer", "model")
    steers: bool = True
    flat: bool = False
    budget: float = KERNEL_BUDGET
    copies: int = 0
    phases: tuple[str, ...] = tuple(PHASES)
    family: str | None = None
    requires: str | None = None

    def enters(self, cell: Cell) -> bool:
        """Whether it has anything to run there."""
        made = self.attention is not None if cell.level == "attention" else cell.level in self.decoder_levels
        return made and cell.phase in self.phases and self.family in (None, cell.shape.family)

    @property
    def missing(self) -> str | None:
        """How to install it, when it is not there."""
        if self.requires is None or importlib.util.find_spec(self.requires) is not None:
            return None
        return f"{self.name} is not installed: pip install 'hf-steer[rivals]'"


CONTENDERS: tuple[Contender, ...] = (
    Contender(FLOOR, attention_stage.plain, decoder_calls.plain, steers=False),
    Contender(OURS, attention_stage.steered, decoder_calls.steered),
    Contender("hf_steer disabled", attention_stage.disabled, decoder_calls.disabled, steers=False),
    Contender("hf_steer strength 0", attention_stage.at_zero, decoder_calls.at_zero, steers=False),
    Contender("dense mask", attention_stage.dense_mask, decoder_calls.dense_mask, copies=2),
    Contender("position_bias", attention_stage.position_bias, decoder_calls.position_bias, copies=2),
    Contender("edited weights", attention_stage.edited, decoder_calls.edited, budget=EAGER_BUDGET, copies=5),
    Contender(
        "pastalib", None, rivals.pasta, ("model",), flat=True, budget=EAGER_BUDGET, copies=6, phases=("prefill", "decode"),
        family="llama", requires="pastalib",
    ),
    Contender("nnsight", None, rivals.nnsight, ("model",), copies=2, phases=("prefill", "decode"), requires="nnsight"),
)  # fmt: skip
_ALWAYS = (FLOOR, OURS)


def choose_contenders(names: Sequence[str] | None = None, backends: Sequence[str] = ()) -> tuple[Contender, ...]:
    """Rows of `CONTENDERS`, and one more per backend that is timed by name.

    Args:
        names: of the rows; the floor and ours come along. None: all.
        backends: of `hf_steer.attention.BACKENDS`.

    Raises:
        ConfigError: a name that is not known.
    """
    known = [row.name for row in CONTENDERS]
    for what, given, allowed in (("contender", names or (), known), ("backend", backends, list(BACKENDS))):
        unknown = [name for name in given if name not in allowed]
        if unknown:
            raise ConfigError(f"{what} {unknown[0]!r} is not known; choose from {', '.join(allowed)}.")
    chosen = [row for row in CONTENDERS if names is None or row.name in (*_ALWAYS, *names)]
    return (*chosen, *(backend_contender(name) for name in backends))


def backend_contender(backend: str) -> Contender:
    """Ours with a backend that is named instead of chosen."""
    return Contender(
        f"{OURS} {backend}",
        partial(attention_stage.steered, backend=backend),
        partial(decoder_calls.steered, backend=backend),
        copies=2 if backend == "mask" else 0,
    )
