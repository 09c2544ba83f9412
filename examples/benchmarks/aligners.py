"""How fast the aligners are: against the seed's forward to the letter, in the same run, with the same weights.

    python examples/benchmarks/aligners.py                  # CPU, float32 and bfloat16: some minutes
    python examples/benchmarks/aligners.py --device cuda    # beside one out-of-place add of the same tensor, torch.compile
    python examples/benchmarks/aligners.py --quick          # small shapes: does it run?

Both sides are first checked against each other, then timed in turns. A ratio is the median over rounds of rival / ours; the
interval holds the middle 60 % of them. Memory is the peak above what the inputs take, in units of one output tensor. Writes
aligners-<device>.csv and aligners-<device>.png.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import literal
import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from hf_steer.aligners import HierarchicalRouter, LayerWiseSteering, ProgressiveRouter, SteerMoEAligner
from hf_steer.aligners.routing import route

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    batch: int = 8
    frames: int = 1500
    features: int = 1280
    experts: int = 8
    global_experts: int = 4
    stages: int = 3
    layers: int = 32


@dataclass(frozen=True)
class Case:
    """One comparison: ours, the rival, and how many times faster ours has to be."""

    name: str
    module: torch.nn.Module
    ours: Callable[[Tensor], Any]
    rival: Callable[[Tensor], Any]
    bar: float


def cases(shape: Shape, device: str) -> list[Case]:
    torch.manual_seed(0)
    how: dict[str, Any] = {"init": "normal"}
    simple = SteerMoEAligner(shape.features, shape.experts, **how)
    hierarchical = HierarchicalRouter(shape.features, shape.experts, shape.global_experts, **how)
    progressive = {
        feedback: ProgressiveRouter(shape.features, shape.experts, shape.stages, feedback=feedback, **how)
        for feedback in ("scores", "steering")
    }
    layer_wise = LayerWiseSteering(shape.features, shape.experts, shape.layers, **how)
    found = [
        Case("simple", simple, simple, lambda h: literal.simple(simple, h), 1.0),
        Case("hierarchical", hierarchical, hierarchical, lambda h: literal.hierarchical(hierarchical, h), 8.0),
        *(
            Case(f"progressive ({feedback})", module, module, lambda h, module=module: literal.progressive(module, h), 2.0)
            for feedback, module in progressive.items()
        ),
        Case(
            "layer-wise routing", layer_wise, lambda h: sliced_routing(layer_wise, h),
            lambda h: literal.layer_wise_routing(layer_wise, h), 4.0,
        ),
    ]  # fmt: skip
    for case in found:
        case.module.to(device)
    return found


def sliced_routing(module: LayerWiseSteering, h: Tensor) -> list[Tensor]:
    """What the aligner computes to route at each layer."""
    layers, experts, _ = module.steering_vectors.shape
    parts = (slice(layer * experts, (layer + 1) * experts) for layer in range(layers))
    return [route(module.router(h, part)[0], temperature=1.0, top_k=None)[0] for part in parts]


def verify(case: Case, h: Tensor) -> float:
    """The largest difference between the two sides, over what the rival's own rounding allows."""
    with torch.no_grad():
        ours, rival = case.ours(h), case.rival(h)
        wide = case.rival(h.double()) if h.dtype == torch.float32 else case.rival(h.float())
    pairs = zip(*([value] if isinstance(value, Tensor) else value for value in (ours, rival, wide)), strict=True)
    worst = 0.0
    for mine, theirs, exact in pairs:
        allowed = (theirs - exact).abs().max() + torch.finfo(h.dtype).eps * exact.abs().max()
        worst = max(worst, float((mine - exact).abs().max() / allowed))
    if worst > 2:
        raise RuntimeError(f"{case.name} differs from the seed's formula by {worst:.1f} times its rounding")
    return worst


def step(call: Callable[[Tensor], Any], module: torch.nn.Module, h: Tensor, gradient: Tensor | None) -> None:
    """One forward pass, and with a gradient of its outputs also the backward pass."""
    if gradient is None:
        with torch.no_grad():
            call(h)
        return
    out = call(h)
    outputs = [out] if isinstance(out, Tensor) else out
    torch.autograd.backward(outputs, [gradient] * len(outputs))
    module.zero_grad(set_to_none=True)
    h.grad = None


def seconds(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """Highest memory during a call, above what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    held = peak = 0
    for event in sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def compare(case: Case, h: Tensor, *, backward: bool, rounds: int, device: str) -> dict[str, Any]:
    h = h.clone().requires_grad_(backward)
    calls = {}
    for name, call in (("ours", case.ours), ("rival", case.rival)):
        with torch.no_grad():
            out = call(h)
        gradient = torch.randn_like(out if isinstance(out, Tensor) else out[0]) if backward else None
        calls[name] = lambda call=call, gradient=gradient: step(call, case.module, h, gradient)
    for run in calls.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):  # in turns, and each side first as often as second
        for name in sorted(calls, reverse=bool(number % 2)):
            taken[name].append(seconds(calls[name], device))
    ratios = np.array(taken["rival"]) / np.array(taken["ours"])
    memory = {name: peak_bytes(run, device) / (h.numel() * h.element_size()) for name, run in calls.items()}
    return {
        "aligner": case.name, "dtype": str(h.dtype).removeprefix("torch."), "pass": "forward + backward" if backward else "forward",
        **{f"{name}_ms": round(1e3 * float(np.median(times)), 3) for name, times in taken.items()},
        "ratio": round(float(np.median(ratios)), 2), "ratio_p20": round(float(np.quantile(ratios, 0.2)), 2),
        "ratio_p80": round(float(np.quantile(ratios, 0.8)), 2), "bar": case.bar,
        "peak_outputs_ours": round(memory["ours"], 2), "peak_outputs_rival": round(memory["rival"], 2),
    }  # fmt: skip


def compare_with_add(case: Case, h: Tensor, *, rounds: int) -> dict[str, Any]:
    """On a GPU: the compiled forward beside one compiled out-of-place add of the same tensor."""
    other = torch.randn_like(h)
    fast, add = torch.compile(case.ours), torch.compile(lambda one, two: one + two)
    with torch.no_grad():
        for _ in range(5):
            fast(h), add(h, other)
        times = {"ours": [], "rival": []}
        for _ in range(rounds):
            times["ours"].append(seconds(lambda: fast(h), "cuda"))
            times["rival"].append(seconds(lambda: add(h, other), "cuda"))
    ratios = np.array(times["ours"]) / np.array(times["rival"])
    return {
        "aligner": case.name, "dtype": str(h.dtype).removeprefix("torch."), "pass": "forward / one add",
        **{f"{name}_ms": round(1e3 * float(np.median(values)), 4) for name, values in times.items()},
        "ratio": round(float(np.median(ratios)), 2), "ratio_p20": round(float(np.quantile(ratios, 0.2)), 2),
        "ratio_p80": round(float(np.quantile(ratios, 0.8)), 2), "bar": 1.5, "peak_outputs_ours": "", "peak_outputs_rival": "",
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios with their intervals; the tick is the bar that each has to clear."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["aligner"] for row in rows))
    kinds = list(dict.fromkeys((row["dtype"], row["pass"]) for row in rows))
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(kinds)
    for place, kind in enumerate(kinds):
        chosen = [row for row in rows if (row["dtype"], row["pass"]) == kind]
        where = np.array([names.index(row["aligner"]) for row in chosen]) + (place - (len(kinds) - 1) / 2) * width
        middle = np.array([row["ratio"] for row in chosen])
        reach = np.abs(np.array([[row["ratio_p20"] for row in chosen], [row["ratio_p80"] for row in chosen]]) - middle)
        axes.bar(where, middle, width * 0.9, yerr=reach, capsize=2, label=", ".join(kind))
    for index, name in enumerate(names):
        bar = next(row["bar"] for row in rows if row["aligner"] == name)
        axes.hlines(bar, index - 0.45, index + 0.45, color="black", linewidth=1)
    axes.set(yscale="log", ylabel="times faster than the formula as written", xticks=range(len(names)))
    axes.set_xticklabels(names, fontsize=8)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=len(kinds))
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, default=HERE)
    given = parser.parse_args()
    shape = Shape(2, 60, 64, 4, 2, 3, 4) if given.quick else Shape()
    rounds = 3 if given.quick else given.rounds
    chip = torch.cuda.get_device_name() if given.device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    context = {"device": chip, "torch": torch.__version__, "date": datetime.date.today().isoformat(), **vars(shape)}
    rows = []
    wanted = [(case, dtype) for dtype in DTYPES.values() for case in cases(shape, given.device)]
    for case, dtype in tqdm(wanted, desc="aligners"):
        torch.manual_seed(1)
        h = torch.randn(shape.batch, shape.frames, shape.features, device=given.device).to(dtype)
        verify(case, h)
        for backward in (False, True):
            rows.append({**compare(case, h, backward=backward, rounds=rounds, device=given.device), **context})
        if given.device == "cuda" and case.name != "layer-wise routing":
            rows.append({**compare_with_add(case, h, rounds=5 * rounds), **context})
    given.output.mkdir(parents=True, exist_ok=True)
    with (given.output / f"aligners-{given.device}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw([row for row in rows if row["pass"] != "forward / one add"], given.output / f"aligners-{given.device}.png")
    for row in rows:
        print(
            f"{row['aligner']:<24}{row['dtype']:<10}{row['pass']:<20}{row['ours_ms']:>10} ms {row['rival_ms']:>10} ms"
            f"{row['ratio']:>8} x  [{row['ratio_p20']}, {row['ratio_p80']}]  bar {row['bar']}  memory {row['peak_outputs_ours']}"
        )


if __name__ == "__main__":
    main()
