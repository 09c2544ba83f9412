"""Named pictures: emoji of three artists, fetched by package name.

Nothing of the pictures is in this repository. `fetch_pictures` takes three packages from npm's registry (`npm pack`), checks their
sha256 and keeps the chosen names in one file in the cache. Twitter's Twemoji are licensed under CC-BY 4.0, Google's Noto Emoji
under the Apache License 2.0, Microsoft's Fluent Emoji under the MIT License.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

STORED_PX = 72
"""Side of the pictures that are kept."""

PACKAGES = {
    "twitter": ("emoji-datasource-twitter@16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "google": ("emoji-datasource-google@16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
}
"""Artist -> npm package and version, and the sha256 of its archive."""
MEMBERS = {
    "twitter": "package/img/twitter/64/{code}.png", "google": "package/img/google/64/{code}.png",
    "fluent": "package/assets/{code}.webp",
}  # fmt: skip

NAMES = (
    # Words that SmolLM2 writes as one token after "a".
    "dragon", "snail", "snake", "sheep", "monkey", "chicken", "turtle", "bird", "penguin", "camel", "mouse", "cow", "tiger",
    "rabbit", "cat", "whale", "horse", "dog", "pig", "frog", "bear", "spider", "crab", "duck", "butterfly", "fish", "tomato",
    "watermelon", "lemon", "banana", "pineapple", "strawberry", "pizza", "cookie", "cake", "carrot", "mushroom", "beer",
    "cactus", "rose", "sunflower", "rainbow", "star", "cloud", "rocket", "helicopter", "train", "bus", "car", "truck", "ship",
    "bike", "house", "church", "balloon", "gift", "trophy", "guitar", "crown", "shirt", "dress", "pill", "bomb", "computer",
    "book", "camera", "key", "lock", "bell", "hammer", "wrench", "candle", "door", "bed", "magnet", "chair", "ladder",
    "keyboard", "phone", "football", "kite", "ghost", "skull", "heart", "tooth", "bone",
)  # fmt: skip


class Missing(RuntimeError):
    """A package that cannot be had, or is not what it was."""


def default_cache() -> Path:
    """Where downloads and trained parts lie: outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_steer" / "real"


def fetch_pictures(folder: Path, names: Sequence[str] = NAMES) -> dict[str, np.ndarray]:
    """Artist -> the pictures of all names, (names, height, width, 4) bytes; fetched once.

    Raises:
        Missing: no npm, no network, or an archive with another hash.
    """
    kept = folder / f"emoji-{hashlib.sha256(' '.join(names).encode()).hexdigest()[:8]}-{STORED_PX}.npz"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        archives = {artist: _archive(folder, artist) for artist in PACKAGES}
        codes = _codes(archives["twitter"], names)
        pictures = {artist: _pictures(path, artist, [codes[name] for name in names]) for artist, path in archives.items()}
        np.savez_compressed(kept, **pictures)
    with np.load(kept) as stored:
        return {artist: stored[artist] for artist in PACKAGES}


def _archive(folder: Path, artist: str) -> Path:
    package, digest = PACKAGES[artist]
    name, _, version = package.rpartition("@")
    path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.is_file():
        command = ["npm", "pack", "--silent", package]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)
        except FileNotFoundError:
            raise Missing(f"npm is not installed; put the archive of {package} into {folder} as {path.name}.") from None
        except subprocess.CalledProcessError as error:
            raise Missing(f"{' '.join(command)} failed: {error.stderr.strip()[-300:]}") from None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise Missing(f"{path} has the sha256 {found}; expected {digest}. Delete it, and it is fetched anew.")
    return path


def _codes(archive: Path, names: Sequence[str]) -> dict[str, str]:
    """Name -> code points, as the files are called."""
    with tarfile.open(archive) as tar:
        rows = json.load(tar.extractfile("package/emoji.json"))  # type: ignore[arg-type]
    known = {name: row["image"].removesuffix(".png") for row in rows for name in row["short_names"]}
    return {name: known[name] for name in names}


def _pictures(archive: Path, artist: str, codes: Sequence[str]) -> np.ndarray:
    """Read in one pass: an archive that is compressed as a whole cannot be jumped in."""
    wanted = {MEMBERS[artist].format(code=spelled): code for code in codes for spelled in (code, code.removesuffix("-fe0f"))}
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in wanted:
                picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")  # type: ignore[union-attr]
                found[wanted[member.name]] = np.asarray(picture.resize((STORED_PX, STORED_PX), Image.Resampling.LANCZOS))
    missing = [code for code in codes if code not in found]
    if missing:
        raise Missing(f"{archive.name} has no pictures of {', '.join(missing)}.")
    return np.stack([found[code] for code in codes])
