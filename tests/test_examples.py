"""Notebooks, trainings and experiments run; what the pages quote of them is held in `docs/test_quoted_figures.py`."""

from __future__ import annotations

import csv
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]

notebooks = pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
MACHINE_PATH = re.compile(r"site-packages|[A-Z]:\\|(?<![\w./:<])/(?:home|mnt|opt|private|root|srv|tmp|Users|usr|var|work)/")


def printed(notebook):
    """All text in a notebook's outputs: streams, results and tracebacks, not the bytes of pictures."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            yield from (output.get("text", ""), *output.get("traceback", []))
            yield from (str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))


@notebooks
def test_notebooks_run_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) >= 8
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    assert not [text for text in printed(notebook) if MACHINE_PATH.search(text)]  # so the next run cannot store one either


@notebooks
def test_no_path_of_a_machine_stands_in_a_notebooks_outputs(path):
    texts = list(printed(nbformat.read(path, as_version=4)))
    assert any(texts)
    assert not [text for text in texts if MACHINE_PATH.search(text)]


TRAININGS = {
    "train_tiny_r1_vl.py": ["--steps", "3", "--batch", "8"],
    "train_tiny_ear.py": [
        "--ear-steps", "3", "--ear-batch", "4", "--ear-sequences", "12", "--mind-steps", "3", "--mind-batch", "4",
    ],
}


@pytest.mark.parametrize("script", TRAININGS)
def test_training_is_reproducible_from_its_seed(script, tmp_path):
    for name in ("one", "two"):
        command = [sys.executable, f"examples/{script}", *TRAININGS[script], "--output", str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=300)
    files = [sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*.*")) for name in ("one", "two")]
    assert files[0] == files[1]
    assert any(name.endswith("model.safetensors") for name in files[0])
    for name in files[0]:
        if not name.endswith(("training.json", "README.md")):  # they say how long it took
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_the_ablation_runs_and_writes_its_tables_and_picture(tmp_path):
    command = [sys.executable, "examples/align_tiny_ear.py", "--preset", "quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=300)
    rows = list(csv.DictReader((tmp_path / "align.csv").read_text().splitlines()))
    assert [row["aligner"] for row in rows] == ["linear alone", "simple", "hierarchical", "progressive", "layer-wise"]
    for row in csv.DictReader((tmp_path / "align_summary.csv").read_text().splitlines()):
        assert float(row["low"]) <= float(row["error_rate"]) <= float(row["high"])
    assert (tmp_path / "align.png").stat().st_size > 5000


def test_the_downstream_experiment_runs_and_writes_its_tables_and_picture(tmp_path):
    command = [sys.executable, "examples/steer_tiny_r1_vl.py", "--preset", "quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=600)
    rows = list(csv.DictReader((tmp_path / "steering.csv").read_text().splitlines()))
    assert {row["task"] for row in rows} == {"pointing", "clutter", "long"}
    assert {row["split"] for row in rows} == {"choosing", "report"}
    controls = {"shuffled", "uniform", "another cell"}
    assert controls <= {row["saliency"] for row in rows if row["task"] == "pointing"}
    for row in rows:
        assert 0 <= float(row["low"]) <= float(row["right"]) <= float(row["high"]) <= 1
    summary = list(csv.DictReader((tmp_path / "steering_summary.csv").read_text().splitlines()))
    assert {row["split"] for row in summary} == {"report"}
    assert (tmp_path / "steering.png").stat().st_size > 5000


def test_the_aligners_benchmark_runs_and_writes_its_table_and_picture(tmp_path):
    command = [sys.executable, "examples/benchmarks/aligners.py", "--quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=300)
    quick = (tmp_path / "aligners-cpu.csv").read_text().splitlines()
    full = (ROOT / "examples" / "benchmarks" / "aligners-cpu.csv").read_text().splitlines()
    assert len(quick) == len(full) == 21
    assert (tmp_path / "aligners-cpu.png").stat().st_size > 5000


def common_row(outcome, *reasons, **models):
    return {"outcome": outcome, "reasons": list(reasons), "models": models}


def test_a_common_test_that_ends_otherwise_when_patched_is_named_and_allowed_for_its_own_reason_alone():
    """The run itself fetches transformers' tests; what it says of two records is held here."""
    script = runpy.run_path(str(ROOT / "examples" / "common_tests"), run_name="common_tests")
    allowed = "test_model_weights_reload_no_missing_tied_weights"
    begins, why = script["ALLOWED"]["zero", allowed]
    plain = {f"LlamaTest::{name}": common_row("passed") for name in ("test_a", "test_b", allowed)}
    plain["WhisperTest::test_a"] = common_row("passed")
    patched = {
        "LlamaTest::test_a": common_row("passed", patched=2), "LlamaTest::test_b": common_row("failed", "it broke", patched=1),
        f"LlamaTest::{allowed}": common_row("failed", begins + " and more", odd=1),
    }  # fmt: skip
    row = script["compare"](plain, patched, "llama", "zero")
    assert (row["tests"], row["same"], row["models_patched"], row["refused"]) == (3, 1, 3, {"odd": 1})
    assert [(one["test"], one["allowed"]) for one in row["differs"]] == [("test_b", None), (allowed, why)]
    patched[f"LlamaTest::{allowed}"]["reasons"] = ["another reason"]
    assert script["compare"](plain, patched, "llama", "zero")["differs"][1]["allowed"] is None
    assert script["compare"](plain, {}, "whisper", "zero")["differs"][0]["patched"] == "missing"
