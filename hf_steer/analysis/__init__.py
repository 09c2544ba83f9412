"""Tools for one's own model: measure, choose heads, choose strengths, look. Evidence and command line stand on them.

What stands behind the figures of the docs lives in `hf_steer.evidence`; its names that were here before are still found here.
"""

from importlib import import_module
from typing import Any

from hf_steer.analysis.calibration import Calibration, calibrate_strength
from hf_steer.analysis.heads import HeadExample, HeadResult, find_grounding_heads
from hf_steer.analysis.metrics import attention_metrics
from hf_steer.analysis.metrics_table import AttentionMetrics
from hf_steer.analysis.retention import Retention, measure_retention
from hf_steer.analysis.sweep import sweep_strength
from hf_steer.analysis.sweep_table import Sweep, SweepRow
from hf_steer.analysis.target_mass import MassStrength, strength_for_mass

__all__ = [
    "AttentionMetrics",
    "Calibration",
    "HeadExample",
    "HeadResult",
    "MassStrength",
    "Retention",
    "Sweep",
    "SweepRow",
    "attention_metrics",
    "calibrate_strength",
    "find_grounding_heads",
    "measure_retention",
    "strength_for_mass",
    "sweep_strength",
]

_EVIDENCE = {"digits": "", "pointing": "", "simulation": "", "simulate": "simulation", "SimulationRow": "simulation"}
"""Names of `hf_steer.evidence` -> its module that has them; it is imported when one is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _EVIDENCE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _EVIDENCE[name]
    return getattr(import_module(f"hf_steer.evidence.{module}"), name) if module else import_module(f"hf_steer.evidence.{name}")
