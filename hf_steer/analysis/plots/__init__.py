"""Pictures; one file per experiment."""

from hf_steer.analysis.plots.bench import plot_bench
from hf_steer.analysis.plots.demo import overlay_saliency, plot_examples, plot_strength
from hf_steer.analysis.plots.heads import plot_heads
from hf_steer.analysis.plots.overlays import overlay_map, plot_overlays
from hf_steer.analysis.plots.simulation import plot_steerability, plot_tradeoff
from hf_steer.analysis.plots.sweep import plot_sweep
from hf_steer.analysis.plots.trace import plot_trace

__all__ = [
    "overlay_map",
    "overlay_saliency",
    "plot_bench",
    "plot_examples",
    "plot_heads",
    "plot_overlays",
    "plot_steerability",
    "plot_strength",
    "plot_sweep",
    "plot_trace",
    "plot_tradeoff",
]
