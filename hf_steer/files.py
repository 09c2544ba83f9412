"""One file at a time: written whole or not at all, found in a folder or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hf_steer.errors import FileError


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary name and move into place, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_file(id_or_dir: str | os.PathLike[str], name: str, **hub_kwargs: Any) -> str:
    """The local path of `name` in a folder or a Hub repository; FileError when it is not there."""
    if os.path.isdir(id_or_dir):
        path = Path(id_or_dir) / hub_kwargs.get("subfolder", "") / name
        if path.is_file():
            return str(path)
        raise FileError(f"{id_or_dir} has no {name}; was it saved with a patched model or SteerConfig.save_pretrained?")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(hf_hub_download(str(id_or_dir), name, **hub_kwargs))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileError(f"{id_or_dir!r} is neither a folder nor a Hub repository with {name}: {error}") from error
