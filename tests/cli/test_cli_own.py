"""Commands on a text-only model and on examples files of one's own."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from hf_steer.analysis.heads import HeadResult
from hf_steer.cli import main
from hf_steer.embedded import embedded_model_dir
from hf_steer.evidence import searching

MODEL = embedded_model_dir().parent / "tiny_r1_text"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write(folder, count, *, answers=True):
    """Which number is meant of three that were heard: the one that is pointed at."""
    random, lines = np.random.default_rng(0), []
    for number in range(count):
        heard = random.choice(10, 3, replace=False)
        prompt = f"i hear {' and '.join(DIGITS[one] for one in heard)} . which number {'please' * (number % 2)} ?"
        line = {"prompt": prompt, "look": DIGITS[heard[number % 3]], "thought": "</think>\n"}
        lines.append({**line, "answer": str(heard[number % 3])} if answers else line)
    path = folder / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(capsys, *words, status=0):
    assert main([*map(str, words), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_heads_of_a_text_only_model_are_found_from_a_file(tmp_path, capsys):
    words = ["--model", MODEL, "--examples-file", write(tmp_path, 40), "--rule", "effect", "--count", 2, "--null-sets", 2]
    found = run(capsys, "heads", *words, "--output", tmp_path)
    result = HeadResult.from_json((tmp_path / "heads.json").read_text())
    assert result.report.measure == "answers"
    assert result.report.examples == 20
    assert found["provenance"]["command"] == (
        "hf-steer heads --model tiny_r1_text --examples-file examples.jsonl --count 2 --rule effect --null-sets 2 --seed 0"
    )
    assert len(found["provenance"]["weights_sha256"]) == 64
    swept = run(capsys, "sweep", "--model", MODEL, "--examples-file", write(tmp_path, 9), "--heads", tmp_path / "heads.json",
                "--strengths", "0,6", "--new-tokens", 3, "--output", tmp_path)["rows"]  # fmt: skip
    assert [len(row["answers"]) for row in swept] == [9, 9]
    assert swept[1]["span_mass"] > swept[1]["unsteered_span_mass"] == swept[0]["span_mass"]
    assert 0 <= swept[0]["task_score"] <= 1


def test_a_sweep_shows_and_keeps_the_answers(tmp_path, capsys):
    words = ["sweep", "--model", MODEL, "--prompt", "i hear seven and two . which number is the first ?", "--say", "seven"]
    assert main([*map(str, words), "--strengths", "0,8", "--new-tokens", "4", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert "prompt 0\n  λ = 0" in printed
    assert 'pointed at "seven"' in printed
    for row in rows:
        (answer,) = json.loads(row["answers"])
        assert repr(" ".join(answer.split())) in printed
        assert float(row["span_mass"]) > 0


def test_strengths_for_quoted_words_are_calibrated(tmp_path, capsys):
    words = ["calibrate", "--model", MODEL, "--prompt", "i hear seven and two . which number is the first ?", "--say", "seven"]
    kept = run(capsys, *words, "--budget", "0.05", "--new-tokens", 4, "--output", tmp_path)
    assert 0 < kept["kl_nats"] <= 0.05
    share = run(capsys, *words, "--target-mass", "0.4", "--heads", '{"1": [0, 1], "2": [3]}', "--output", tmp_path)
    assert share["missed_share"] <= 0.05
    assert share["steered_mass"]["2"]["3"] == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--say", "seven"], "--say needs --prompt, the text whose words it quotes, and --model"),
        (["--say", "a", "--image", "x.png"], "--image and --say each say what to look at; give one of them"),
        (["--say", "nine", "--prompt", "i hear seven", "--model", str(MODEL)], "--prompt, line 1: row 0: 'nine' is not in its"),
        (["--examples-file", "nowhere.jsonl", "--model", str(MODEL)], "nowhere.jsonl cannot be read"),
        (["--prompt", "i hear seven", "--model", str(MODEL)], "needs --image, at least one, and --prompt; or --say and --prompt"),
    ],
)
@pytest.mark.parametrize("command", [["sweep"], ["calibrate", "--budget", "1"]])
def test_what_does_not_go_together_is_refused(command, words, message, capsys, tmp_path):
    error = run(capsys, *command, *words, "--output", tmp_path, status=1)
    assert message in error["error"]


def test_too_few_examples_are_refused_with_the_reason(tmp_path, capsys):
    error = run(capsys, "heads", "--model", MODEL, "--examples-file", write(tmp_path, 30), status=1)
    assert "15 to choose with, 15 to report on; it takes at least 20 of each. Of 20 answers a share is known to about a fifth" in (
        error["error"]
    )
    with pytest.raises(SystemExit):
        main(["heads", "--help"])
    assert "How many examples: at least 40" in capsys.readouterr().out


def test_the_lists_of_the_search_leave_open_which_entry_is_meant():
    lines = searching.search_prompts(60, seed=1)
    assert len({f"{line['prompt']} {line['look']}" for line in lines}) == 60
    assert lines == searching.search_prompts(60, seed=1) != searching.search_prompts(60, seed=2)
    for line in lines:
        entries = line["prompt"].splitlines()
        (kind,) = [own for own in searching.KINDS.values() if own.question == entries[-1]]
        named = [value for value in kind.values if any(entry.endswith(kind.entry.split("{source}")[1].format(value=value))
                                                       for entry in entries)]  # fmt: skip
        assert len(entries) == searching.ENTRIES + searching.OTHERS + 1
        assert len(named) == searching.ENTRIES
        assert line["answer"].strip() in named
        assert line["answer"].strip() in line["look"]
        assert line["prompt"].count(line["look"]) == 1
