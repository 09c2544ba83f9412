"""Pictures; one file per experiment."""

from hf_steer.analysis.plots.demo import overlay_saliency, plot_examples, plot_strength
from hf_steer.analysis.plots.simulation import plot_steerability, plot_tradeoff

__all__ = ["overlay_saliency", "plot_examples", "plot_steerability", "plot_strength", "plot_tradeoff"]
