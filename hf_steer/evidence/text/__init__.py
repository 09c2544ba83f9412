"""Pointing at text: tasks, what is said about them, and how answers are scored."""

from __future__ import annotations

from hf_steer.evidence.text.cases import SPLITS, TASKS, Case, make_cases

__all__ = ["SPLITS", "TASKS", "Case", "make_cases"]
