"""Which releases of transformers this package was held against, and what is said beyond them."""

from __future__ import annotations

import functools
import warnings

import transformers

OLDEST, NEWEST = (5, 14), (5, 24)
"""Releases between which the whole contract is tested; the bound in pyproject.toml is the older one."""


def release() -> tuple[int, int]:
    """Major and minor version of the transformers that is installed."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def tested_range() -> str:
    """The range in words, for messages."""
    return f"transformers {transformers.__version__}; tested are {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"


@functools.cache
def warn_untested() -> None:
    """Once per process, on a transformers that is newer than the newest tested one: the survey decides what works."""
    if release() > NEWEST:
        warnings.warn(
            f"hf_steer has not been tested on this {tested_range()}. What it relies on is looked up in each model before anything "
            "is changed, and each steered pass is checked, so steering either works or raises. Update hf_steer when you can.",
            stacklevel=5,
        )
