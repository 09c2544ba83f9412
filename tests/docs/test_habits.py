"""What contributors are told to run is what the hooks, the README and the project's data say."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile

import pytest
import yaml
from kit.documents import README, ROOT, block, words_of

if sys.version_info >= (3, 11):
    import tomllib

HOOKS = {
    hook["id"]: hook
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]
}
OURS = ("*.py", "*.md", "*.toml", "*.yml", "*.yaml")


def parts(command):
    return [part.strip() for part in command.strip().split("&&")]


def test_the_three_commands_of_contributing_are_the_readmes_one():
    assert parts(block("set up")) + parts(block("check")) + parts(block("test")) == parts(block("tests"))


def test_the_hooks_run_the_checks_of_contributing():
    entries = [hook["entry"] for hook in HOOKS.values() if hook["language"] == "system"]
    assert entries == parts(block("check"))
    assert all(hook["pass_filenames"] is False for hook in HOOKS.values() if hook["language"] == "system")


def test_nothing_is_fetched_by_the_hooks_but_from_pypi():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    for name, hook in HOOKS.items():
        assert hook["language"] in ("system", "python"), name
        fetched = hook.get("additional_dependencies", [])
        assert all(re.fullmatch(r"[a-z0-9-]+([=<>~!]=?[\d.]+)?", each) for each in fetched), name
        assert bool(fetched) == (hook["language"] == "python"), name


def test_the_files_keep_what_the_hooks_tidy():
    """The fixers' own rules, for the files that people write: one line end at the end, no blanks at the end of lines."""
    excluded = re.compile(HOOKS["end-of-file-fixer"]["exclude"])
    folders = [ROOT / name for name in ("hf_steer", "examples", "tests", "docs", ".ci", ".github")]
    files = [path for folder in folders for kind in OURS for path in folder.rglob(kind)]
    files += [path for kind in OURS for path in ROOT.glob(kind)]
    files = [path for path in files if not excluded.search(path.relative_to(ROOT).as_posix())]
    assert len(files) > 200
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not text or re.search(r"[^\n]\n\Z", text), path
        assert not re.search(r"[ \t]+$", text, re.MULTILINE), path


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib begins with Python 3.11")
def test_the_project_says_where_it_is_and_who_wrote_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"Homepage", "Documentation", "Changelog", "Citation"} <= set(project["urls"])
    page = f"https://pypi.org/project/{project['name']}/"
    assert all(re.fullmatch(re.escape(page) + r"(#(description|history|files))?", url) for url in project["urls"].values())
    (author,) = project["authors"]
    cited = block("bibtex").replace("\\", "")
    assert author["name"] in cited
    assert page in cited
    assert author["name"] in words_of(README)  # which is what the description shows
    assert page in words_of(README)


def test_the_source_distribution_holds_every_page(tmp_path):
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[-1] for name in file.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {"docs/changelog.md", "docs/citation.md", "docs/CONTRIBUTING.md"} <= wanted
    assert wanted <= names
