"""What the README and the examples say is what happens."""

from __future__ import annotations

import csv
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from hf_steer.ground import versions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(name):
    return re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.DOTALL).group(1)


def test_the_quickstart_runs_as_pasted_and_prints_what_the_readme_shows(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", block("quickstart")], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120
    )
    assert run.stdout == block("quickstart output")
    assert len(run.stdout.splitlines()) == 6


def test_the_readme_and_the_package_name_the_tested_releases():
    oldest, newest = (f"{major}.{minor}" for major, minor in (versions.OLDEST, versions.NEWEST))
    assert f"transformers {oldest} to {newest}" in README
    assert f'"transformers>={oldest},<6"' in (ROOT / "pyproject.toml").read_text()


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


def test_the_four_questions_run_as_pasted_and_print_what_the_readme_shows():
    command = [sys.executable, "-c", block("questions")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=300)
    assert run.stdout == block("questions output")


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


def test_the_readme_shows_the_heads_own_table():
    from hf_steer.analysis.heads import HeadResult

    result = HeadResult.from_json((ROOT / "examples" / "figures" / "heads.json").read_text())
    assert str(result).startswith(block("heads output").rstrip())
    assert result.report.chosen.value >= 0.85


SHARE = re.compile(r"(\d\.\d\d)\s+\[(\d\.\d\d), (\d\.\d\d)\]")


def test_the_readme_quotes_the_experiment_and_the_heads():
    """Every share with an interval in the section is one of the report's, or of the heads' own file."""
    section = README[README.index("## Where, which heads") : README.index("## What you can say about the gaze")]
    rows = list(csv.DictReader((ROOT / "examples" / "figures" / "steering.csv").read_text().splitlines()))
    rows = [row for row in rows if row["split"] == "report"]
    known = {tuple(f"{float(row[name]):.2f}" for name in ("right", "low", "high")) for row in rows}
    report = json.loads((ROOT / "examples" / "figures" / "heads.json").read_text())["report"]
    estimates = [value for value in report.values() if isinstance(value, dict)]
    known |= {tuple(f"{own[end]:.2f}" for end in ("value", "low", "high")) for own in estimates}
    quoted = SHARE.findall(section)
    assert len(quoted) >= 8
    assert not [share for share in quoted if share not in known]


def test_the_readme_shows_the_ablations_own_table():
    table = list(csv.DictReader((ROOT / "examples" / "figures" / "align_summary.csv").read_text().splitlines()))
    assert len(table) == 21
    for row in table:
        if row["experts"] in ("0", "8"):
            rate, low, high = (100 * float(row[name]) for name in ("error_rate", "low", "high"))
            less, less_low, less_high = (100 * float(row[f"less_linear{end}"]) for end in ("", "_low", "_high"))
            cells = f"{rate:.1f} [{low:.1f}, {high:.1f}] | {less:+.1f} [{less_low:+.1f}, {less_high:+.1f}]"
            assert cells in README or row["aligner"] == "linear alone", cells
            assert f"{rate:.1f} [{low:.1f}, {high:.1f}]" in README


def test_the_readme_counts_the_intervals_that_leave_out_zero():
    table = list(csv.DictReader((ROOT / "examples" / "figures" / "align_summary.csv").read_text().splitlines()))[1:]
    apart = [row for row in table if float(row["less_linear_low"]) > 0 or float(row["less_linear_high"]) < 0]
    assert len(table) == 20
    assert len(apart) == 1
    less, low, high = (100 * float(apart[0][f"less_linear{end}"]) for end in ("", "_low", "_high"))
    said = f"({apart[0]['aligner']}, {apart[0]['experts']} experts: {less:+.1f} [{low:+.1f}, {high:+.1f}])"
    assert said in " ".join(README.split())
    assert "one 95 % interval leaves out zero" in README


def test_composing_runs_as_pasted_and_prints_what_the_readme_shows():
    run = subprocess.run([sys.executable, "-c", block("align")], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120)
    assert run.stdout == block("align output")


def test_the_aligners_benchmark_runs_and_the_readme_quotes_it(tmp_path):
    command = [sys.executable, "examples/benchmarks/aligners.py", "--quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=300)
    quick = list(csv.DictReader((tmp_path / "aligners-cpu.csv").read_text().splitlines()))
    full = list(csv.DictReader((ROOT / "examples" / "benchmarks" / "aligners-cpu.csv").read_text().splitlines()))
    assert len(quick) == len(full) == 20
    assert (tmp_path / "aligners-cpu.png").stat().st_size > 5000
    for row in full:
        if row["pass"] == "forward" and row["dtype"] == "float32":
            assert f"{row['aligner']} {float(row['ratio']):.1f}" in " ".join(README.split()), row["aligner"]


BENCH = ROOT / "examples" / "benchmarks" / "bench-cpu.csv"
SHOWN = ("hf_steer", "dense mask", "position_bias", "edited weights")


def bench_rows():
    return list(csv.DictReader(BENCH.read_text().splitlines()))


def bench_table(rows):
    """The README's table: Qwen2-VL-2B's shape, times the plain model's time, as the benchmark wrote it."""
    cells = {}
    for row in rows:
        if row["shape"] == "qwen2-vl-2b" and row["level"] in ("attention", "model") and row["phase"] != "training":
            place = row["level"], row["phase"], int(row["batch"]), int(row["tokens"]), row["dtype"]
            cells.setdefault(place, {})[row["contender"]] = row
    lines = []
    for (level, phase, batch, tokens, dtype), found in cells.items():
        ours = found["hf_steer"]
        first = f"{float(ours['ratio']):.2f} [{float(ours['ratio_p20']):.2f}, {float(ours['ratio_p80']):.2f}]"
        others = [f"{float(found[name]['ratio']):.2f}" if name in found else "" for name in SHOWN[1:]]
        where = f"{level}, {phase}" + (f", batch {batch}" if batch > 1 else "")
        lines.append("| " + " | ".join([where, str(tokens), dtype, first, *others]) + " |")
    return lines


def test_the_readme_shows_the_benchmarks_own_table_and_counts_its_bars():
    text, rows = (ROOT / "README.md").read_text(), bench_rows()
    lines = bench_table(rows)
    assert len(lines) == 24
    for line in lines:
        assert line in text
    held = [row for row in rows if row["holds"]]
    steered = [row for row in held if row["contender"] == "hf_steer"]
    kept = sum(row["holds"] == "True" for row in held), sum(row["holds"] == "True" for row in steered)
    assert f"{kept[1]} of its {len(steered)} rows" in " ".join(text.split())
    assert f"{kept[0]} of all {len(held)}" in " ".join(text.split())
    off = [
        float(row["ratio"]) for row in rows
        if row["contender"] in ("hf_steer disabled", "hf_steer strength 0") and row["phase"] in ("prefill", "decode")
    ]  # fmt: skip
    assert f"the median of its {len(off)} cells is {statistics.median(off):.3f}" in " ".join(text.split())
    (patching,) = (row for row in rows if row["level"] == "patching")
    assert f"takes {float(patching['ms']):.1f} ms" in text
    assert max(float(row["error_ratio"]) for row in rows if row["contender"] == "hf_steer" and row["error_ratio"]) < 4


def test_the_readme_quotes_the_second_run():
    table = csv.DictReader((ROOT / "examples" / "benchmarks" / "bench-cpu-prefill.csv").read_text().splitlines())
    ours = [row for row in table if (row["level"], row["contender"]) == ("model", "hf_steer")]
    again = {(row["tokens"], row["dtype"]): float(row["ratio"]) for row in ours}
    first, second, third, fourth = (f"{ratio:.2f}" for ratio in again.values())
    assert f"reads {first}, {second}, {third} and {fourth} for 1024 and 4096 tokens" in " ".join(README.split())
    once = {
        (row["tokens"], row["dtype"]): float(row["ratio"]) for row in bench_rows()
        if (row["level"], row["shape"], row["phase"], row["contender"]) == ("model", "qwen2-vl-2b", "prefill", "hf_steer")
    }  # fmt: skip
    assert list(once) == list(again)
    assert all(min(once[place], again[place]) <= 1.05 for place in once)
