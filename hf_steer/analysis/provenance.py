"""Where a number comes from: versions, model, and hashes of what was measured, so that a table can say so and be gone on with."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from hf_steer.analysis.prompts import Batch
from hf_steer.patching.scopes import scope_of, steering_of

_DIGITS = 16
"""Hexadecimal digits of a hash: 64 bits."""


@dataclass(frozen=True)
class Provenance:
    """Attributes of a measurement.

    Attributes:
        date: when it was begun, ISO 8601, UTC.
        hf_steer: version.
        torch: version.
        transformers: version.
        model: name or path.
        model_type: of its configuration.
        config_hash: of the steering configuration.
        inputs_hash: of the prompts, of what is said about them, and of how they were measured.
        seed: of what was drawn.
    """

    date: str
    hf_steer: str
    torch: str
    transformers: str
    model: str
    model_type: str
    config_hash: str
    inputs_hash: str
    seed: int


def provenance_of(model: Any, batches: Sequence[Batch], *, seed: int, **settings: Any) -> Provenance:
    """Where a measurement on a patched model comes from.

    Args:
        model: patched.
        batches: what it is measured on; what is in force already counts as said about those that say nothing.
        seed: of what is drawn.
        **settings: whatever else decides the outcome.
    """
    from hf_steer import __version__

    steering = steering_of(model)
    in_force = scope_of(steering).saliency
    said = [(batch.inputs, in_force if batch.saliency is None else batch.saliency) for batch in batches]
    config = steering.plan.anatomy.root.config
    return Provenance(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        hf_steer=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        model=config.name_or_path,
        model_type=config.model_type,
        config_hash=content_hash(steering.plan.config.to_json()),
        inputs_hash=content_hash([said, settings]),
        seed=seed,
    )


def content_hash(value: Any) -> str:
    """The same for the same content: tensors, arrays, dataclasses, mappings in any order, sequences, plain values."""
    return hashlib.sha256(_digest(value)).hexdigest()[:_DIGITS]


def _digest(value: Any) -> bytes:
    parts: list[bytes]
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        parts = [f"tensor {value.dtype} {tuple(value.shape)}".encode(), content]
    elif isinstance(value, np.ndarray):
        parts = [f"array {value.dtype} {value.shape}".encode(), np.ascontiguousarray(value).tobytes()]
    elif dataclasses.is_dataclass(value):
        names = [item.name for item in dataclasses.fields(value)]
        parts = [type(value).__name__.encode(), *(_digest((name, getattr(value, name))) for name in names)]
    elif isinstance(value, Mapping):
        parts = [b"mapping", *sorted(_digest(item) for item in value.items())]
    elif isinstance(value, (list, tuple)):
        parts = [b"sequence", *(_digest(item) for item in value)]
    else:
        parts = [type(value).__name__.encode(), repr(value).encode()]
    # a hash of hashes: no two different contents run into each other
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
