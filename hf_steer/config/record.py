"""What a save notes about itself in `steer_config.json`, beside the configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from hf_steer.errors import FileError, shown

RECORD = "saved"
"""Its key in `steer_config.json`."""


@dataclass(frozen=True)
class Record:
    """What belongs to a saved configuration. It is no part of it: two that ask for the same are equal wherever they lie.

    Args:
        weights: sha256 of the weights file that was saved with it; None when none was.
        base: whether the base model was saved with it, into the same folder.
    """

    weights: str | None = None
    base: bool = False

    @classmethod
    def from_json(cls, values: Any, path: str) -> Record:
        """FileError where it is none that we wrote."""
        known = isinstance(values, dict) and set(values) == {item.name for item in fields(cls)}
        if known and isinstance(values["base"], bool):
            digest = values["weights"]
            if digest is None or (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
                return cls(**values)
        raise FileError(
            f"{path}: {RECORD!r} is what hf_steer noted about this save, the sha256 of its weights and whether the base is beside "
            f"them; got {shown(values)}. Save it again."
        )
