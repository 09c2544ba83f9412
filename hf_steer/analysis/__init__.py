"""Experiments and pictures; nothing else imports this package but the command line."""

from hf_steer.analysis.simulation import SimulationRow, simulate

__all__ = ["SimulationRow", "simulate"]
