"""Pictures; one file per experiment."""

from hf_steer.analysis.plots.demo import overlay_saliency, plot_examples, plot_strength
from hf_steer.analysis.plots.sweep import plot_sweep

__all__ = ["overlay_saliency", "plot_examples", "plot_strength", "plot_sweep"]
