"""Every error that hf_steer raises on purpose; each is also the built-in that a caller would expect. And what is said but once."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

_LONGEST = 120


class SteerError(Exception):
    """Root of all hf_steer errors. Messages say what was wrong, what came, what is allowed, and what to do next."""


class ConfigError(SteerError, ValueError):
    """A `SteerConfig` that is wrong in itself, or does not fit the model."""


class SaliencyError(SteerError, ValueError):
    """Saliency that is malformed, or does not fit the prompt."""


class AlignerError(SteerError, ValueError):
    """Features, text or masks that an aligner cannot take, or sizes that it cannot be built with."""


class PatchError(SteerError, RuntimeError):
    """The model is not in the state that the call needs: unknown, patched already, or changed since."""


class GroundError(PatchError):
    """What hf_steer relies on in transformers is not there in this model or this version; nothing has been touched."""


class FileError(SteerError, OSError):
    """A file of a saved steering that is missing, truncated, foreign or from a newer version."""


class ContractError(SteerError, AssertionError):
    """A model that breaks a promise of the contract; see `hf_steer.testing.check_family`."""


def shown(value: Any) -> str:
    """A value as a message shows it: a line at most, whatever came."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists in lists
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


@cache
def say_once(message: str) -> None:
    """Warn, once per message and process; `say_once.cache_clear()` lets all be said anew."""
    warnings.warn(message, stacklevel=2)
