"""Reads CTranslate2's `model.bin`: a list of named arrays, and aliases between them. Nothing of CTranslate2 is needed, or run.

The layout of version 6, all little-endian: version (u32), name of the specification, its revision (u32), number of
variables (u32), the variables, number of aliases (u32), pairs of names. A variable is: name, rank (u8), sizes (u32 each),
type (u8), bytes (u32), and the bytes. A name is: length (u16, its closing zero counted), the letters, a zero.
"""

import struct
from dataclasses import dataclass

import numpy as np

VERSION = 6
TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")


class FormatError(ValueError):
    """The file is not what it should be."""


@dataclass(frozen=True)
class Model:
    """What a `model.bin` holds.

    Attributes:
        name: of the specification, for example `WhisperSpec`.
        revision: of that specification.
        variables: arrays by name; those of bfloat16 come as float32, which holds them exactly. An alias is the array it stands for.
    """

    name: str
    revision: int
    variables: dict[str, np.ndarray]


class _Reader:
    def __init__(self, content):
        self.content, self.at = memoryview(content), 0

    def take(self, length):
        if self.at + length > len(self.content):
            raise FormatError(
                f"the file ends after {len(self.content)} bytes, and {length} more are announced at {self.at}: a part is missing"
            )
        self.at += length
        return self.content[self.at - length : self.at]

    def number(self, code):
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self):
        letters = bytes(self.take(self.number("H")))
        if not letters.endswith(b"\0"):
            raise FormatError(f"a name ends without its zero at byte {self.at}: this is no CTranslate2 model of version {VERSION}")
        return letters[:-1].decode()

    def array(self):
        shape = tuple(self.number("I") for _ in range(self.number("B")))
        kind = self.number("B")
        if kind >= len(TYPES):
            raise FormatError(f"an array of type {kind}; known are 0 to {len(TYPES) - 1} ({', '.join(TYPES)})")
        content = self.take(self.number("I"))
        if TYPES[kind] == "bfloat16":
            values = (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(content, np.dtype(TYPES[kind]).newbyteorder("<"))
        if values.size != int(np.prod(shape)):
            raise FormatError(f"an array of shape {shape} has {values.size} values, {int(np.prod(shape))} are due")
        return values.reshape(shape)


def read_model(content):
    """The arrays of a `model.bin`.

    Args:
        content: the whole file as bytes; a file that was published in parts is the parts one after the other.

    Raises:
        FormatError: of another version, cut off, or with bytes left over.
    """
    reader = _Reader(content)
    version = reader.number("I")
    if version != VERSION:
        raise FormatError(f"format version {version}, and only {VERSION} is known here")
    name, revision = reader.text(), reader.number("I")
    variables = {}
    for _ in range(reader.number("I")):
        key = reader.text()
        variables[key] = reader.array()
    for _ in range(reader.number("I")):
        alias, meant = reader.text(), reader.text()
        variables[alias] = variables[meant]
    if reader.at != len(reader.content):
        raise FormatError(f"{len(reader.content) - reader.at} bytes are left over after the last alias")
    return Model(name, revision, variables)
