"""Experiments and pictures; nothing else imports this package but the command line."""

from hf_steer.analysis.metrics import AttentionMetrics, attention_metrics
from hf_steer.analysis.retention import Retention, measure_retention

__all__ = ["AttentionMetrics", "Retention", "attention_metrics", "measure_retention"]
