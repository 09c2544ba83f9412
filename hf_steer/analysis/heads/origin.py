"""Where a list of heads comes from: on which model, with what, when."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_steer.analysis.heads.examples import Row
from hf_steer.analysis.provenance import content_hash
from hf_steer.config import SaliencyConfig
from hf_steer.ground.parts import Anatomy

_PLACES = ("name_or_path", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""What a configuration says of where it lies and how it is held, not of the model."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class HeadProvenance:
    """Attributes of a search.

    Attributes:
        date: ISO 8601, UTC.
        hf_steer: version.
        torch: version.
        transformers: version.
        model: the last part of its name or path.
        model_type: of its configuration.
        attends: what its heads look at, `"self"` or `"cross"`.
        layers: how many attend.
        heads: in each of them.
        config_hash: of its configuration.
        weights_sha256: of its weights' files, one after the other; None where nobody looked.
        examples_hash: of the examples, those of the report included.
        normalize: how spans were scaled.
        preserve_mass: whether pictures kept their mass.
        seed: of the split and the random sets.
        command: that found them; None outside of the command line.
    """

    date: str
    hf_steer: str
    torch: str
    transformers: str
    model: str
    model_type: str
    attends: str
    layers: int
    heads: int
    config_hash: str
    weights_sha256: str | None
    examples_hash: str
    normalize: str
    preserve_mass: bool | None
    seed: int
    command: str | None = None


def origin_of(anatomy: Anatomy, rows: Sequence[Row], saliency: SaliencyConfig, *, seed: int) -> HeadProvenance:
    """Of a search on a model; nothing of the machine's folders is in it."""
    from hf_steer import __version__

    config = anatomy.root.config
    return HeadProvenance(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        hf_steer=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        model=Path(config.name_or_path).name,
        model_type=config.model_type,
        attends=anatomy.attends,
        layers=len(anatomy.layers),
        heads=anatomy.num_heads,
        config_hash=config_hash(config),
        weights_sha256=None,
        examples_hash=content_hash([(row.inputs, row.query, row.answer, row.media, row.target) for row in rows]),
        normalize=saliency.normalize,
        preserve_mass=saliency.preserve_mass,
        seed=seed,
    )


def config_hash(config: Any) -> str:
    """Of what a configuration says of the model."""
    return content_hash({name: value for name, value in config.to_dict().items() if name not in _PLACES})


def weights_sha256(folder: str | os.PathLike[str]) -> str | None:
    """Of the safetensors files in a folder, by name, one after the other; None where there are none."""
    files = sorted(Path(folder).glob("*.safetensors")) if os.path.isdir(folder) else []
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
