"""Experiments and pictures; nothing else imports this package but the command line."""

from hf_steer.analysis.calibration import Calibration, calibrate_strength
from hf_steer.analysis.metrics import attention_metrics
from hf_steer.analysis.metrics_table import AttentionMetrics
from hf_steer.analysis.retention import Retention, measure_retention
from hf_steer.analysis.sweep import sweep_strength
from hf_steer.analysis.sweep_table import Sweep, SweepRow
from hf_steer.analysis.target_mass import MassStrength, strength_for_mass

__all__ = [
    "AttentionMetrics",
    "Calibration",
    "MassStrength",
    "Retention",
    "Sweep",
    "SweepRow",
    "attention_metrics",
    "calibrate_strength",
    "measure_retention",
    "strength_for_mass",
    "sweep_strength",
]
