"""Pictures; one file per experiment."""

from hf_steer.analysis.plots.heads import plot_heads
from hf_steer.analysis.plots.overlays import overlay_map, overlay_saliency, plot_overlays
from hf_steer.analysis.plots.sweep import plot_sweep
from hf_steer.analysis.plots.trace import plot_trace

__all__ = ["overlay_map", "overlay_saliency", "plot_heads", "plot_overlays", "plot_sweep", "plot_trace"]
