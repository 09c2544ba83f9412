"""Experiments and pictures; nothing else imports this package but the command line."""

from hf_steer.analysis.heads import HeadExample, HeadResult, find_grounding_heads

__all__ = ["HeadExample", "HeadResult", "find_grounding_heads"]
