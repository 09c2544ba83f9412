"""Decoders whose attention cannot be steered for a reason that their structure does not tell: one row each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

REASONS: Mapping[str, str] = MappingProxyType({
})
"""Model type of the decoder -> what, why, and what works instead."""


def why_odd(decoder: Any) -> str | None:
    """Why a decoder's attention cannot be steered, where that is known of its type."""
    return REASONS.get(decoder.config.model_type)
