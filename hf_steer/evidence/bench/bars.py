"""What has to hold: the benchmark's bars, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """One bar; it concerns the rows that every field agrees with.

    Attributes:
        quantity: a column of `table.COLUMNS`.
        limit: the number.
        most: whether it is the highest allowed, or the lowest.
        contenders: who is held to it.
        levels: where.
        phases: when.
        device: `"cpu"` or `"cuda"`; None for both.
        shape: of the model; None for all.
        tokens: shortest and longest.
    """

    quantity: str
    limit: float
    most: bool
    contenders: tuple[str, ...]
    levels: tuple[str, ...]
    phases: tuple[str, ...]
    device: str | None = None
    shape: str | None = None
    tokens: tuple[int, int] = (1024, 1 << 20)

    def concerns(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is held to it, and has been measured."""
        return (
            row[self.quantity] is not None
            and row["contender"] in self.contenders
            and row["level"] in self.levels
            and row["phase"] in self.phases
            and self.device in (None, row["kind"])
            and self.shape in (None, row["shape"])
            and self.tokens[0] <= row["tokens"] <= self.tokens[1]
        )

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row that it concerns keeps it."""
        value = row[self.quantity]
        return bool(value <= self.limit if self.most else value >= self.limit)

    def __str__(self) -> str:
        return f"{self.quantity} {'<=' if self.most else '>='} {self.limit:g}"


_OURS, _STEPS = ("hf_steer",), ("prefill", "decode")
_RIVALS = ("dense mask", "edited weights")
_ALL = ("attention", "layer", "model")
_CPU_TOKENS, _CUDA_TOKENS = (1024, 4096), (1024, 32768)

BARS: tuple[Bar, ...] = (
    # two CPU cores
    Bar("ratio", 1.15, True, _OURS, ("attention",), ("prefill",), "cpu", None, _CPU_TOKENS),
    Bar("ratio", 1.10, True, _OURS, ("attention",), ("decode",), "cpu", None, _CPU_TOKENS),
    Bar("ratio", 1.05, True, _OURS, ("model",), ("prefill",), "cpu", None, _CPU_TOKENS),
    Bar("ratio", 1.03, True, _OURS, ("model",), ("decode",), "cpu", None, _CPU_TOKENS),
    Bar("times_ours", 1.4, False, _RIVALS, ("attention",), ("prefill",), "cpu", None, (4096, 4096)),
    # anywhere: queries × keys would grow with the square, which is an exponent of 2
    Bar("memory_growth", 1.25, True, _OURS, _ALL, ("prefill",)),
    Bar("ratio", 1.01, True, ("hf_steer disabled", "hf_steer strength 0"), _ALL, _STEPS),
    # an H100 or H200
    Bar("ratio", 1.02, True, _OURS, ("model",), ("prefill",), "cuda", None, _CUDA_TOKENS),
    Bar("ratio", 1.02, True, _OURS, ("model",), ("decode",), "cuda", None, _CUDA_TOKENS),
    Bar("added_ms", 0.05, True, _OURS, ("layer",), ("prefill",), "cuda", "seed", (1024, 1024)),
    Bar("ratio", 1.08, True, ("hf_steer triton",), ("attention",), ("prefill",), "cuda", None, (1024, 16384)),
    Bar("times_triton", 1.0, False, ("hf_steer flex",), ("attention",), ("prefill",), "cuda", None, (1024, 16384)),
    # patching a 7B-shaped Qwen2-VL: one attention projection of it takes 26 MB
    Bar("ms", 50.0, True, _OURS, ("patching",), ("set-up",), None, "qwen2-vl-7b", (0, 0)),
    Bar("peak_mb", 10.0, True, _OURS, ("patching",), ("set-up",), None, "qwen2-vl-7b", (0, 0)),
)
"""The bar of the aligners, 1.5 times one add, is `examples/benchmarks/aligners.py --device cuda`'s."""


def judge(row: Mapping[str, Any]) -> tuple[str, bool | None]:
    """The bars that concern a row, as text, and whether all of them hold; None where there are none."""
    concerned = [bar for bar in BARS if bar.concerns(row)]
    return "; ".join(map(str, concerned)), all(bar.holds(row) for bar in concerned) if concerned else None


def missed_bars(row: Mapping[str, Any]) -> list[Bar]:
    """Those that concern a row and do not hold."""
    return [bar for bar in BARS if bar.concerns(row) and not bar.holds(row)]
