"""What `examples/real` is tested with: its modules by name, and small packages of the kinds that it reads."""

from __future__ import annotations

import importlib
import io
import struct
import sys
import tarfile
import wave
import zipfile
from pathlib import Path

import numpy as np

REAL = Path(__file__).parents[2] / "examples" / "real"


def real(name):
    """A module of `examples/real`, whose files import each other by name as scripts do."""
    if str(REAL) not in sys.path:
        sys.path.insert(0, str(REAL))
    found = importlib.import_module(name)
    assert Path(found.__file__).parent == REAL
    return found


def text_bytes(text):
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def model_bin(variables, aliases=(), *, name="WhisperSpec", version=6, types=("float32", "int8", "int16", "int32", "float16")):
    """CTranslate2's file with these arrays, written here by its description, not by the reader's code."""
    found = struct.pack("<I", version) + text_bytes(name) + struct.pack("<II", 3, len(variables))
    for key, value in variables.items():
        value = np.asarray(value)
        found += text_bytes(key) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        content = value.tobytes()
        found += struct.pack("<BI", types.index(str(value.dtype)), len(content)) + content
    found += struct.pack("<I", len(aliases))
    return found + b"".join(text_bytes(one) + text_bytes(other) for one, other in aliases)


def write_wheel(path, members):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)


def write_deb(path, members):
    """A Debian package that holds nothing but its data; a name may lead out of it, to be refused."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    parts = (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue()))
    path.write_bytes(b"!<arch>\n" + b"".join(ar_member(name, content) for name, content in parts))


def ar_member(name, content):
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
    return head + content + b"\n" * (len(content) % 2)


def wav_bytes(samples, rate_hz):
    found = io.BytesIO()
    with wave.open(found, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(np.round(np.asarray(samples) * 32767).astype("<i2").tobytes())
    return found.getvalue()
