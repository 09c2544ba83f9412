"""Pictures of the evidence; one file per experiment."""

from hf_steer.evidence.plots.bench import plot_bench
from hf_steer.evidence.plots.demo import plot_examples, plot_strength
from hf_steer.evidence.plots.simulation import plot_steerability, plot_tradeoff

__all__ = ["plot_bench", "plot_examples", "plot_steerability", "plot_strength", "plot_tradeoff"]
