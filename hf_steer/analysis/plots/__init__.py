"""Pictures; one file per experiment."""

from hf_steer.analysis.plots.demo import overlay_saliency, plot_examples, plot_strength
from hf_steer.analysis.plots.heads import plot_heads

__all__ = ["overlay_saliency", "plot_examples", "plot_heads", "plot_strength"]
