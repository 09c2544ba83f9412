"""`examples/real/listen.py` on a tiny random Whisper and tones in place of phrases: that it runs, and measures what it says."""

from __future__ import annotations

import csv
import itertools

import numpy as np
import pytest
import torch
from kit.published import write_whisper
from kit.real import real

TEXTS = ["".join(letters) for letters in itertools.product("ab", repeat=3)]


@pytest.fixture
def phrases(tmp_path):
    """Twelve tones of a second; their words are strange and all different."""
    folder = tmp_path / "phrases"
    folder.mkdir()
    at = np.arange(16_000) / 16_000
    found = [(f"p{number}", 0.3 * np.sin(2 * np.pi * (200 + 50 * number) * at), f"{first} {second} a b")
             for number, (first, second) in enumerate(itertools.islice(itertools.product(TEXTS[:4], TEXTS[4:]), 12))]  # fmt: skip
    real("recordings").write_recordings(folder, found)
    return folder


@pytest.fixture
def sound(phrases):
    return real("listening").Sound(tuple(real("recordings").read_recordings(phrases)[:3]), 1)


def test_phrases_lie_where_their_seconds_say(sound):
    samples = sound.samples()
    assert [second for span in sound.spans for second in span] == pytest.approx([0.3, 1.3, 1.9, 2.9, 3.5, 4.5])
    assert len(samples) / 16_000 == pytest.approx(sound.seconds) == pytest.approx(5.1)
    for start, end in sound.spans:
        inside = samples[round(start * 16_000) : round(end * 16_000)]
        assert np.abs(inside).max() > 0.2
        assert not samples[round(end * 16_000) : round((end + 0.6) * 16_000)].any()
    assert sound.alone().phrases == (sound.phrases[1],)
    statements = {name: way(sound, 1) for name, way in real("listening").STATEMENTS.items()}
    assert statements["phrase and pauses"] == [pytest.approx((1.6, 3.2))]
    assert statements["phrase and end"] == [pytest.approx((1.9, 2.9)), pytest.approx((5.1, 30.0))]


def test_no_text_is_on_both_sides_of_the_split_and_every_phrase_is_asked_for_once(phrases):
    listening = real("listening")
    choosing, report = listening.split_phrases(real("recordings").read_recordings(phrases))
    assert (len(choosing), len(report)) == (4, 8)
    assert not {one.text for one in choosing} & {one.text for one in report}
    sounds = listening.make_sounds(report, 8)
    assert len({one.phrases[one.pointed].text for one in sounds}) == 8
    assert [one.pointed for one in sounds] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert all(len({phrase.text for phrase in one.phrases}) == 3 for one in sounds)


def test_a_transcript_is_scored_by_the_words_of_the_phrase_asked_for(sound):
    score = real("listening").score
    own, other = (" ".join(sound.words(which)) for which in (1, 2))
    assert score(sound, own) == {"recall": 1.0, "share": 1.0, "f1": 1.0, "edits": 0, "words": 4, "right": 1.0}
    assert score(sound, other)["right"] == 0.0
    assert score(sound, "")["right"] == score(sound, "")["share"] == 0.0
    whole = score(sound, " ".join(" ".join(sound.words(which)) for which in range(3)))
    assert (whole["recall"], whole["share"], whole["edits"], whole["right"]) == (1.0, pytest.approx(4 / 12), 8, 0.0)


def test_shuffled_scores_are_as_many_and_lie_elsewhere_in_the_sound(sound):
    listening = real("listening")
    scores = listening.shuffled_scores(sound, "phrase and end")
    phrase, length = slice(95, 145), round(5.1 * 50)
    assert scores.sum() == 50 + 1500 - length
    assert scores[length:].all()
    assert scores[:length].sum() == 50
    assert scores[phrase].sum() < 25
    assert not torch.equal(scores, listening.shuffled_scores(sound, "phrase and end", seed=1))


def test_the_experiment_runs_is_gone_on_with_and_writes_its_table_and_picture(tmp_path, phrases, monkeypatch, capsys):
    write_whisper(tmp_path / "tiny")
    listen, listening = real("listen"), real("listening")
    monkeypatch.setattr(listening, "MOST_TOKENS", 6)
    monkeypatch.setattr(listen, "HEADS_KEPT", 2)
    words = ["--quick", "--model", str(tmp_path / "tiny"), "--phrases", str(phrases), "--cache", str(tmp_path / "cache"),
             "--output", str(tmp_path / "out")]  # fmt: skip
    listen.main(words)
    rows = list(csv.DictReader((tmp_path / "out" / "listen.csv").read_text().splitlines()))
    assert {(row["split"], row["task"]) for row in rows} >= {("choosing", "three"), ("report", "three"), ("report", "beams")}
    assert {"nothing", "pointed-at", "another phrase", "shuffled", "uniform"} <= {row["said"] for row in rows}
    for row in rows:
        assert (row["right"] == "") is (row["task"] == "alone")
        assert 0 <= float(row["recall"]) <= 1
        if row["task"] == "alone":
            continue
        assert 0 <= float(row["right_low"]) <= float(row["right"]) <= float(row["right_high"]) <= 1
        assert (row["model"], row["model_type"], len(row["inputs_hash"])) == ("tiny", "whisper", 16)
    report = [row for row in rows if row["split"] == "report"]
    plain, uniform = (next(row for row in report if row["said"] == said) for said in ("nothing", "uniform"))
    assert listen.as_markdown(rows).count("\n") == len(report) + 1
    assert (plain["config_hash"], plain["wer_more"], uniform["wer"]) == ("", "0.0000", plain["wer"])
    assert (tmp_path / "out" / "listen.png").stat().st_size > 5000
    before = (tmp_path / "cache" / "tiny.jsonl").read_text()
    monkeypatch.setattr(listening.Ear, "decode", None)  # nothing is heard a second time
    listen.main(words)
    assert (tmp_path / "cache" / "tiny.jsonl").read_text() == before
    again = list(csv.DictReader((tmp_path / "out" / "listen.csv").read_text().splitlines()))
    assert [{**row, "date": ""} for row in again] == [{**row, "date": ""} for row in rows]
    assert "written:" in capsys.readouterr().out
    (tmp_path / "cache" / "tiny.jsonl").write_text("\n".join(before.splitlines()[:-2]) + "\n")
    listen.main([*words, "--known"])
    fewer = list(csv.DictReader((tmp_path / "out" / "listen.csv").read_text().splitlines()))
    assert 0 < len(fewer) < len(rows)
    assert "not heard yet: report three" in capsys.readouterr().out


def test_steering_reaches_what_the_ear_writes(tmp_path, sound, monkeypatch):
    write_whisper(tmp_path / "tiny")
    listening, listen = real("listening"), real("listen")
    monkeypatch.setattr(listening, "MOST_TOKENS", 8)
    ear = listening.Ear(tmp_path / "tiny", tmp_path / "cache", dtype=torch.float32)
    strong = listen.attention_of(listen.Setting("all", 50.0, "none", "phrase"), {"all": "all"})
    looks = ear.aligned_heads([sound])
    assert looks.shape == (1, 4)
    assert torch.all((looks >= 0) & (looks <= 1))
    plain = ear.hear([sound, sound.alone()], "plain")
    told = ear.hear([sound, sound.alone()], "told", strong, listening.pointing())
    assert len(plain) == len(told) == 2
    assert plain != told
    assert ear.model.generation_config.alignment_heads == [[0, 1]]
