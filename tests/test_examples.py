"""What the README and the examples say is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(name):
    return re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.DOTALL).group(1)


def test_the_quickstart_runs_as_pasted_and_prints_what_the_readme_shows(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", block("quickstart")], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120
    )
    assert run.stdout == block("quickstart output")
    assert len(run.stdout.splitlines()) == 4


def test_the_readme_shows_the_demos_own_table():
    shown = block("demo output")
    table = (ROOT / "examples" / "figures" / "pointing.csv").read_text().splitlines()[1:]
    assert len(table) == 10
    for line in table:
        saliency, strength, share, low, high, readable, kl, _ = line.split(",")
        figures = f"{float(share):>5.2f}  {f'[{float(low):.2f}, {float(high):.2f}]':<21}{float(readable):>20.2f}{float(kl):>12.3f}"
        assert f"{saliency:<18}{float(strength):>4g}   {figures}" in shown


def test_the_readmes_commands_are_one_line_each():
    for name in ("demo", "tests"):
        command = block(name)
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && ")
    assert 'sed -n \'/<!-- tests -->/' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_run_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) >= 8
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()


def test_training_is_reproducible_from_its_seed(tmp_path):
    for name in ("one", "two"):
        command = [sys.executable, "examples/train_tiny_r1_vl.py", "--steps", "3", "--batch", "8", "--output", str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=300)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]
    for name in files[0]:
        if name not in ("training.json", "README.md"):  # they say how long it took
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
