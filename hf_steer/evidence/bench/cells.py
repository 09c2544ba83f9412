"""What is timed: one cell is one piece of a model, in one phase, at one size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from hf_steer.errors import ConfigError
from hf_steer.evidence.bench.shapes import SHAPES, Shape

LEVELS = ("attention", "layer", "model")
PHASES: Mapping[str, tuple[int, ...]] = MappingProxyType({"prefill": (1,), "decode": (1, 16), "training": (1,)})
"""Phase -> batch sizes."""
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
_CPU_LAYERS = 2
_CPU_LONG = 1024
"""What takes a CPU longest is timed up to this length by default: training, the seed's shape, single layers, Llama 3.2 1B, and more
than one layer of a model."""
_GPU_TRAINING = 4096
_ROOM = 0.35
"""Share of a GPU's memory for weights and caches; rivals that hold queries × keys want some, too."""


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Attributes:
        level: of `LEVELS`.
        shape: of the model.
        phase: of `PHASES`.
        batch: rows.
        tokens: of the prompt, or keys in the cache before the new token.
        dtype: of weights and activations.
        device: `"cpu"` or `"cuda"`.
        layers: of the model; 1 at the other levels.
    """

    level: str
    shape: Shape
    phase: str
    batch: int
    tokens: int
    dtype: str
    device: str
    layers: int

    @property
    def queries(self) -> int:
        return 1 if self.phase == "decode" else self.tokens

    @property
    def keys(self) -> int:
        """Keys that the last query sees: at the levels with a cache, the new token's is one of them."""
        return self.tokens + (self.phase == "decode" and self.level != "attention")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def scores_bytes(self) -> int:
        """Bytes of one heads × queries × keys tensor in this cell's type."""
        return self.batch * self.shape.heads * self.queries * self.keys * self.torch_dtype.itemsize


def list_cells(
    device: str,
    *,
    levels: Sequence[str] | None = None,
    phases: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    layers: int | None = None,
) -> tuple[Cell, ...]:
    """The cells of a run, in the order in which they run.

    Args:
        device: `"cpu"` or `"cuda"`.
        levels: of `LEVELS`; all by default.
        phases: of `PHASES`; all by default.
        shapes: of `SHAPES`. None: seed to Llama-8B; on a CPU only Qwen2-VL-2B's as a layer and as a model, where Llama 3.2 1B,
            for pastalib, is a model, too.
        tokens: lengths. None: 1024 and 4096, on a GPU also 16384 and 32768. With nothing else chosen, some of the longest
            cells are left out.
        dtypes: of `DTYPES`. None: float32 and bfloat16; on a GPU bfloat16.
        layers: of whole models. None: 2 on a CPU, 1 for more than 1024 tokens; on a GPU as many as fit.

    Raises:
        ConfigError: a name that is not known.
    """
    for what, given, known in (
        ("level", levels or (), LEVELS), ("phase", phases or (), tuple(PHASES)), ("shape", shapes or (), tuple(SHAPES)),
        ("dtype", dtypes or (), tuple(DTYPES)),
    ):  # fmt: skip
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError(f"{what} {unknown[0]!r} is not known; choose from {', '.join(known)}.")
    on_cpu = device == "cpu"
    lengths = tokens or ((1024, 4096) if on_cpu else (1024, 4096, 16384, 32768))
    if min(lengths) < 2:
        raise ConfigError(f"tokens must be at least 2; got {min(lengths)}.")
    return tuple(
        _sized(Cell(level, SHAPES[shape], phase, batch, length, dtype, device, 1), layers)
        for level in levels or LEVELS
        for shape in shapes or _default_shapes(level, on_cpu)
        for dtype in dtypes or (("float32", "bfloat16") if on_cpu else ("bfloat16",))
        for phase in phases or PHASES
        for length in lengths
        for batch in PHASES[phase]
        if tokens or phases or shapes or _by_default(level, shape, phase, length, on_cpu=on_cpu)
    )


def _default_shapes(level: str, on_cpu: bool) -> Iterator[str]:
    if level == "attention" or not on_cpu:
        yield from ("seed", "qwen2-vl-2b", "qwen2-vl-7b", "llama-8b")
    else:
        yield "qwen2-vl-2b"
    if level == "model":
        yield "llama-1b"


def _by_default(level: str, shape: str, phase: str, length: int, *, on_cpu: bool) -> bool:
    """A whole run is to take about a quarter of an hour."""
    if not on_cpu:
        return phase != "training" or length <= _GPU_TRAINING
    if phase == "training":
        return length <= _CPU_LONG and shape == "qwen2-vl-2b"
    return length <= _CPU_LONG or (level != "layer" and shape not in ("seed", "llama-1b"))


def _sized(cell: Cell, layers: int | None) -> Cell:
    """The cell with as many layers as asked for or as fit."""
    if cell.level != "model":
        return cell
    shape, count = cell.shape, layers
    if count is None and cell.device == "cpu":
        count = _CPU_LAYERS if cell.tokens <= _CPU_LONG else 1
    elif count is None:
        room = _ROOM * torch.cuda.get_device_properties(0).total_memory
        count = int(room // _layer_bytes(cell))
    values = vars(cell) | {"layers": max(1, min(count, shape.layers))}
    return Cell(**values)


def _layer_bytes(cell: Cell) -> int:
    """Weights of one layer, its part of a cache that is there twice for a moment, and what its backward pass keeps."""
    shape, size, tokens = cell.shape, cell.torch_dtype.itemsize, cell.batch * cell.tokens
    held = shape.layer_parameters + 2 * 2 * tokens * shape.key_value_heads * shape.head_dim
    if cell.phase == "training":
        held += tokens * (12 * shape.hidden + 4 * shape.intermediate)
    return size * held
