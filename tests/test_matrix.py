"""The matrix of versions says in one place what is tested, and the other files agree with it."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
LOWEST = re.search(r'"transformers>=(\d+\.\d+),', PROJECT).group(1)


def release(version):
    return tuple(int(part) for part in version.split(".")[:2])


@pytest.fixture
def matrix():
    spec = importlib.util.spec_from_file_location("matrix", ROOT / ".ci" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_oldest_set_is_the_lower_bound_of_the_project_and_the_others_follow_in_order(matrix):
    versions = [re.fullmatch(r"transformers==([\d.]+)", requirements[0]).group(1) for requirements in matrix.SETS.values()]
    assert next(iter(matrix.SETS)) == "oldest"
    assert release(versions[0]) == release(LOWEST)
    assert [release(version) for version in versions] == sorted({release(version) for version in versions})
    assert len(versions) >= 2


def test_no_other_file_pins_a_version_of_transformers(matrix):
    files = [*(ROOT / ".ci").iterdir(), *(ROOT / ".github").rglob("*.yml"), *(ROOT / "docs").rglob("*.md")]
    files += [ROOT / name for name in ("README.md", "pyproject.toml", ".pre-commit-config.yaml")]
    assert [path.name for path in files if path.is_file() and "transformers==" in path.read_text()] == ["matrix.py"]


def test_every_kind_of_test_finds_its_files_and_new_ones_join_by_their_names(matrix, monkeypatch, tmp_path):
    found = matrix.files()
    files = "test_files.py", "test_bad_files.py", "test_saves_are_whole.py", "test_saved_with_adapters.py", "test_kept_aligners.py"
    contract = "test_contract.py", "test_contract_of_families.py"
    for name in (*files, *contract, "test_gaze_of_every_family.py", "test_conversations.py", "test_versions.py"):
        assert any(path.endswith(f"/{name}") for path in found), name
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for new in ("patching/test_contract_of_hooks.py", "ground/deep/test_names.py"):
        (tmp_path / "tests" / new).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / new).touch()
        assert f"tests/{new}" in matrix.files()
    shutil.rmtree(tmp_path / "tests" / "ground")
    with pytest.raises(SystemExit, match=r"no test file matches \{'ground': "):
        matrix.files()


def test_a_set_that_would_replace_torch_and_an_unknown_set_are_errors(matrix, monkeypatch):
    planned = '{"install": [{"metadata": {"name": "torch", "version": "2.4.0"}}]}'
    monkeypatch.setattr(matrix, "run_pip", lambda *arguments: planned)
    with pytest.raises(SystemExit, match=r"would replace \['torch==2.4.0'\]"):
        matrix.lay(["torch==2.4.0"], "nowhere")
    with pytest.raises(SystemExit, match=r"no sets \['newest'\].*there are \['oldest'"):
        matrix.main(["newest"])


def test_a_failing_set_fails_the_run_after_the_others_have_run(matrix, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(matrix, "PYTHON", tmp_path)
    monkeypatch.setattr(matrix, "run_pip", lambda *arguments: "")
    monkeypatch.setattr(matrix, "passes", lambda name: ran.append(name) or name != "oldest")
    with pytest.raises(SystemExit, match=r"failed on these sets of versions: \['oldest'\]"):
        matrix.main([])
    assert ran == list(matrix.SETS)


def test_a_set_that_pip_does_not_find_for_an_old_python_is_passed_over_and_said(matrix, monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(matrix, "PYTHON", tmp_path)
    monkeypatch.setattr(matrix, "run_pip", lambda *arguments: "")
    monkeypatch.setattr(matrix, "passes", lambda name: ran.append(name) or True)
    monkeypatch.setattr(matrix.sys, "version_info", (3, 10, 12))
    matrix.main([])
    assert ran == [name for name in matrix.SETS if name not in matrix.NEEDS_PYTHON]
    assert ran[0] == "oldest"
    for name in matrix.NEEDS_PYTHON:
        assert f"+ {name}: passed over, its packages need Python 3.11" in capsys.readouterr().out


def test_the_workflow_runs_the_same_script_weekly_on_the_oldest_and_the_newest_python():
    workflow = (ROOT / ".github" / "workflows" / "matrix.yml").read_text()
    oldest = re.search(r'requires-python = ">=([\d.]+)"', PROJECT).group(1)
    assert f'python: ["{oldest}", "3.x"]' in workflow
    assert "run: .ci/run\n" in workflow
    assert re.search(r'cron: "\d+ \d+ \* \* [0-6]"', workflow)
    assert "pull_request:" in workflow
    script = (ROOT / ".ci" / "run").read_text()
    assert script.index("<!-- tests -->") < script.index("python .ci/matrix.py")


def test_the_readme_names_the_oldest_versions(matrix):
    oldest = re.search(r'requires-python = ">=([\d.]+)"', PROJECT).group(1)
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"Python {oldest} or later, and transformers {LOWEST} to" in text
