"""A save is one thing: its files are staged beside their places, and one rename turns them into the saved ones.

A folder that is being saved to holds `.hf_steer-saving-*`, which is nothing yet; when all is written, one rename makes that
`.hf_steer-saved`, and from then on its files are the folder's, wherever they lie (`place_of`). They are moved to their places at
once. Should the saver be killed before that is done, whoever reads or saves next does it (`finish_save`). A kill or a full disk
leaves the old files or the new ones, and savers of one folder take turns.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hf_steer.errors import FileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SAVING, SAVED = ".hf_steer-saving-", ".hf_steer-saved"
GONE = ".gone"
"""Ends the name of an empty file that is staged where the save takes a file away."""
_WEIGHTS = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def whole_save(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Write into the folder that this gives; when the block ends well, all of it is saved in `directory`, else nothing.

    Args:
        directory: made when it is not there. Files that the save does not write stay, but for shards of weights that it does.

    Raises:
        FileError: it is no folder. What goes wrong on the disk comes as the OSError that it is.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileError(f"{folder} is a file, or lies in one; a save needs a folder ({error}).") from error
    with ExitStack() as alive:
        with _held(folder):
            stage = Path(tempfile.mkdtemp(prefix=SAVING, dir=folder))
            alive.enter_context(_held(stage))
        alive.callback(shutil.rmtree, stage, ignore_errors=True)
        yield stage
        if any(stage.iterdir()):
            _sync(stage)
            with _held(folder):
                _settle(folder, recovering=True)
                _clear(folder, stage)
                _mark_gone(folder, stage)
                os.replace(stage, folder / SAVED)  # until here the old files, from here on the new ones
                _settle(folder, recovering=False)


def finish_save(directory: str | os.PathLike[str]) -> None:
    """Move the files of a save to their places, where its saver was killed before it had.

    Raises:
        FileError: the folder cannot be written.
    """
    folder = Path(directory)
    if not (folder / SAVED).is_dir():
        return
    try:
        with _held(folder):
            _settle(folder, recovering=True)
    except OSError as error:
        raise FileError(
            f"a save into {folder} was interrupted when all was written but not yet in place, and what is left to do cannot be "
            f"done from here ({error}). Call this once where the folder can be written."
        ) from error


def place_of(folder: Path, name: str) -> Path | None:
    """Where a file of the folder lies now; None when it has none of that name."""
    staged, place = folder / SAVED / name, folder / name
    if staged.is_file():
        return staged
    if staged.with_name(staged.name + GONE).is_file():
        return None
    return place if place.is_file() else None


def _settle(folder: Path, *, recovering: bool) -> None:
    """Move what is saved to its place, file by file; whoever is interrupted leaves the rest to the next one."""
    saved = folder / SAVED
    if not saved.is_dir():
        return
    for staged in sorted(path for path in saved.rglob("*") if path.is_file()):
        place = folder / staged.relative_to(saved)
        gone = place.name.endswith(GONE)
        if gone:
            place = place.with_name(place.name.removesuffix(GONE))
        if recovering and place.exists() and place.stat().st_mtime_ns > staged.stat().st_mtime_ns:
            continue  # written since, by someone who does not know of us
        if gone:
            place.unlink(missing_ok=True)
            with suppress(OSError):  # its folder, when nothing else is in it
                place.parent.rmdir()
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, place)
    shutil.rmtree(saved)


def _clear(folder: Path, own: Path) -> None:
    """Remove what killed savers had begun; a living one holds its folder."""
    for stage in folder.glob(f"{SAVING}*"):
        if stage != own:
            with _held(stage, wait=False) as ours:
                if ours:
                    shutil.rmtree(stage, ignore_errors=True)


def _mark_gone(folder: Path, stage: Path) -> None:
    """Mark shards of the weights that are saved and that this save does not have; a loader would take them for its own."""
    names = {path.name for path in stage.iterdir()}
    stems = {found[1] for name in names if (found := _WEIGHTS.fullmatch(name))}
    for path in folder.iterdir():
        found = _WEIGHTS.fullmatch(path.name)
        if found and found[1] in stems and path.name not in names:
            (stage / f"{path.name}{GONE}").touch()
    for marker in [path for path in stage.rglob(f"*{GONE}")]:
        if not (folder / marker.relative_to(stage)).with_name(marker.name.removesuffix(GONE)).exists():
            marker.unlink()
            if marker.parent != stage and not any(marker.parent.iterdir()):
                marker.parent.rmdir()


def _sync(stage: Path) -> None:
    """Have the files on the disk before the rename that makes them count."""
    for path in stage.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())


@contextmanager
def _held(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a folder against other threads and processes; the system lets go of it when the holder dies. Whether it is held."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows does not open folders
        descriptor = -1
    try:
        held = _flock(descriptor, wait=wait)
        if held is not None:
            yield held
            return
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    if not wait:  # whether it is held cannot be asked here
        yield False
        return
    from filelock import FileLock

    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:32]
    with FileLock(os.path.join(tempfile.gettempdir(), f"hf_steer-{name}.lock")):
        yield True


def _flock(descriptor: int, *, wait: bool) -> bool | None:
    """Whether the lock is ours; None where the system or the file system has none (Windows, some network disks)."""
    if fcntl is None or descriptor < 0:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
