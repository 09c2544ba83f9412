"""`hf-steer bench --quick`: few cells, verified as all are, on one screen."""

from __future__ import annotations

import csv
import json

import pytest

from hf_steer.cli import main
from hf_steer.evidence.bench import FULL, QUICK, contenders
from hf_steer.evidence.bench.contenders import Contender
from hf_steer.evidence.bench.decoder_calls import plain as plain_decoder
from hf_steer.evidence.bench.screen import screen

TINY = ["bench", "--quick", "--shapes", "tiny", "--tokens", "24", "--seconds", "0"]
LINES, COLUMNS = 24, 100


def test_it_prints_one_screen_that_says_what_it_is_and_what_there_is_more(tmp_path, capsys):
    assert main([*TINY, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    for text in ("tiny, 24 tokens, float32, batch 1", "times plain's time", "memory of a call", "error against float64"):
        assert text in said.out
    for piece in ("attention, prefill", "attention, decode", "model, prefill", "model, decode"):
        assert sum(line.startswith(piece) for line in lines) == 2
    assert lines[-3].startswith("A quick look")
    assert lines[-3].endswith(": hf-steer bench")
    assert [path.name for path in tmp_path.iterdir()] == ["bench-cpu-quick.csv"]


def test_its_rows_are_verified_and_a_full_runs_table_stays(tmp_path, capsys):
    (tmp_path / "bench-cpu.csv").write_text("half an hour's work")
    assert main([*TINY, "--json", "--output", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quick"] is True
    assert report["left_out"] == report["wrong"] == []
    *timed, patching = report["rows"]
    assert {row["contender"] for row in timed} == {"plain", "hf_steer", "hf_steer disabled", "dense mask"}
    assert {(row["level"], row["phase"], row["batch"]) for row in timed} == {
        (level, phase, 1) for level in ("attention", "model") for phase in ("prefill", "decode")
    }
    assert all(0 < row["error_ratio"] < 4 for row in timed)
    assert patching["level"] == "patching"
    with (tmp_path / "bench-cpu-quick.csv").open(newline="") as file:
        assert [row["contender"] for row in csv.DictReader(file)] == [row["contender"] for row in report["rows"]]
    assert (tmp_path / "bench-cpu.csv").read_text() == "half an hour's work"


def test_a_wrong_contender_fails_here_too(monkeypatch, tmp_path, capsys):
    forgetful = Contender("dense mask", None, plain_decoder)
    rows = tuple(forgetful if row.name == "dense mask" else row for row in contenders.CONTENDERS)
    monkeypatch.setattr(contenders, "CONTENDERS", rows)
    assert main([*TINY, "--phases", "decode", "--output", str(tmp_path)]) == 1
    assert "WRONG: dense mask (model, tiny, decode, batch 1, 24 tokens, float32)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [FULL, QUICK])
def test_what_is_chosen_by_default_is_there(kind):
    cells = kind["cpu"].cells("cpu")
    assert cells
    assert kind["cpu"].rows()[0].name == "plain"
    assert set(kind) == {"cpu", "cuda"}
    if kind is QUICK:
        assert [(cell.level, cell.phase, cell.shape.name, cell.tokens, cell.dtype, cell.layers) for cell in cells] == [
            (level, phase, "qwen2-vl-2b", 1024, "float32", 1) for level in ("attention", "model") for phase in ("prefill", "decode")
        ]


def test_large_numbers_and_other_cells_fit_the_screen():
    row = {
        "shape": "qwen2-vl-2b", "batch": 1, "tokens": 1024, "dtype": "float32", "layers": 28, "ms": 12345.678, "ratio": 12.345,
        "ratio_p20": 10.004, "ratio_p80": 13.996, "peak_mb": 12345.67, "error_ratio": 1.04,
    }  # fmt: skip
    names = ("plain", "hf_steer", "hf_steer disabled", "dense mask")
    cells = [(level, phase) for level in ("attention", "model") for phase in ("prefill", "decode")]
    rows = [{**row, "level": level, "phase": phase, "contender": name} for level, phase in cells for name in names]
    patching = {**row, "level": "patching", "device": "AMD EPYC 9R14 96-Core Processor", "threads": 192, "torch": "2.15.0+cu130"}
    lines = screen([*rows, patching]).splitlines()
    assert len(lines) <= LINES - 4
    assert max(map(len, lines)) <= COLUMNS
    assert "12.35 [10.00, 14.00]" in lines[4]
    more = [{**row, "level": "model", "phase": "decode", "contender": name, "dtype": "bfloat16"} for name in names[:2]]
    assert any(line.startswith("model, decode, bfloat16 ") for line in screen([*rows, *more, patching]).splitlines())
