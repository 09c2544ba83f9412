"""Experiments and pictures; nothing else imports this package but the command line."""

from hf_steer.analysis.metrics import AttentionMetrics, attention_metrics

__all__ = ["AttentionMetrics", "attention_metrics"]
