"""Cut short: Ctrl-C and a closed pipe end quietly, and no file is half written."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from hf_steer.cli.main import COMMANDS, main

NEEDED = {"inspect": ["MODEL"], "saliency": ["IMAGE"], "calibrate": ["--budget", "1"]}
LISTENING = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's `&` has it ignored
PROGRAM = [sys.executable, "-W", "error", "-c", f"{LISTENING}from hf_steer.cli import main; sys.exit(main())"]


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
@pytest.mark.parametrize("json", [[], ["--json"]])
def test_an_interrupt_in_any_command_is_one_line_and_status_130(name, json, monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    module = sys.modules["hf_steer.cli.main"]
    rows = tuple(dataclasses.replace(command, run=interrupted) for command in COMMANDS)
    monkeypatch.setattr(module, "COMMANDS", rows)
    assert main([name, *NEEDED.get(name, []), *json]) == 130
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "hf-steer: interrupted\n")


CUT_SHORT = {
    "sweep.csv": ["sweep", "--scenes", "8", "--strengths", ",".join(map(str, range(400)))],
    "bench-cpu.csv": ["bench", "--shapes", "tiny", "--tokens", "64", "--seconds", "2"],
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of this kind are POSIX's")
@pytest.mark.parametrize("table", CUT_SHORT)
def test_an_interrupted_run_leaves_whole_files(table, tmp_path):
    with subprocess.Popen(
        [*PROGRAM, *CUT_SHORT[table], "--output", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        ends = time.monotonic() + 120
        while not (tmp_path / table).exists() and running.poll() is None and time.monotonic() < ends:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        printed, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert said.splitlines()[-1] == "hf-steer: interrupted"
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert printed == ""
    assert [path.name for path in tmp_path.iterdir()] == [table]
    with (tmp_path / table).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(None not in row and None not in row.values() for row in rows)


def run_without_a_reader(*words, both=False, buffered=True):
    stderr = subprocess.STDOUT if both else subprocess.PIPE
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    running = subprocess.Popen(
        [*PROGRAM, *map(str, words)], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
    )
    running.stdout.close()  # as head does when it has read enough
    said = "" if both else running.stderr.read()
    if not both:
        running.stderr.close()
    assert not any(word in said for word in ("Traceback", "BrokenPipe", "Exception ignored")), said
    return running.wait(timeout=120)


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_a_closed_pipe_ends_quietly(tmp_path):
    (tmp_path / "file").write_text("")
    refused = ["demo", "--output", tmp_path / "file"]
    for words in (["--help"], ["bench", "--help"], [*refused, "--json"]):
        assert run_without_a_reader(*words) == 141
    assert run_without_a_reader(*refused, both=True) == 141
    assert run_without_a_reader(*refused, "--json", buffered=False) == 141
    assert run_without_a_reader("--help", buffered=False) == 0  # argparse keeps to itself that it could not print


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_a_closed_pipe_takes_no_file_away(tmp_path):
    small = ["simulate", "--strengths", "0,1", "--seeds", "0", "--tokens", "8", "--num-heads", "1", "--output", tmp_path]
    assert run_without_a_reader(*small) == 141
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".png", ".png"]
