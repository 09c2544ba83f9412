"""One file at a time: written whole or not at all, found in a folder or on the Hub, read strictly."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from hf_steer.errors import FileError
from hf_steer.saving import place_of

MOST_BYTES = 1 << 20
"""Of a configuration; one that steers every head of a hundred layers by itself has a third of it."""
_MOST_DIGITS = 30


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary name and move into place, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:  # its own, for each thread
        temporary = Path(folder) / path.name
        temporary.write_bytes(content)
        os.replace(temporary, path)


def find_file(id_or_dir: str | os.PathLike[str], name: str, **hub_kwargs: Any) -> str:
    """The local path of `name` in a folder or a Hub repository; FileError when it is not there."""
    if os.path.isdir(id_or_dir):
        path = place_of(Path(id_or_dir) / hub_kwargs.get("subfolder", ""), name)
        if path is not None:
            return str(path)
        raise FileError(f"{id_or_dir} has no {name}; was it saved with a patched model or SteerConfig.save_pretrained?")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(hf_hub_download(str(id_or_dir), name, **hub_kwargs))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileError(f"{id_or_dir!r} is neither a folder nor a Hub repository with {name}: {error}") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
        FileError: a large file, which is not read at all; something else than one JSON object; a key that is there twice; a
            number that is not finite, or is written with more digits than any of ours has.
    """
    again = "it is truncated or foreign. Save it again."
    try:
        size = os.stat(path).st_size
        if size > MOST_BYTES:
            raise FileError(f"{path} has {size:,} bytes, a configuration at most {MOST_BYTES:,}; {again}")
        values = json.loads(
            Path(path).read_text(encoding="utf-8"),
            object_pairs_hook=_without_twins, parse_constant=_refused, parse_float=_finite, parse_int=_short,
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON ({error}); {again}") from error
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise FileError(f"{path} holds {type(values).__name__}, not a steering configuration; save it again.")
    return values


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twin[:60]!r} is there twice")
    return values


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"{digits[:_MOST_DIGITS]} is larger than any number")
    return float(digits)


def _short(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)
