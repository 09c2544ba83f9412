"""The pages hang together: a short README, links that lead somewhere, commands that parse, files that are there."""

from __future__ import annotations

import re
import shlex

import pytest
from kit.documents import PAGES, README, ROOT, anchors_of, block, every_block, links_of, name_of, prose_of, spans_of_code

import hf_steer
from hf_steer.cli.main import COMMANDS, make_parser
from hf_steer.ground import versions

WIDTH = 132
pages = pytest.mark.parametrize("page", PAGES, ids=name_of)
OUTSIDE = re.compile(r"[a-z]+:")


def test_the_readme_is_short_and_says_first_what_it_is():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert lines[0] == "# hf_steer"
    assert any(line.startswith("![") for line in lines[:15])
    assert lines.index("<!-- demo -->") < lines.index("<!-- quickstart -->") < lines.index("<!-- tests -->")


def test_the_readmes_commands_are_one_line_each():
    for name in ("demo", "tests"):
        command = block(name)
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && ")
        assert f"<!-- {name} -->" in README.read_text()
    assert "sed -n '/<!-- tests -->/" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_and_the_package_name_the_tested_releases():
    oldest, newest = (f"{major}.{minor}" for major, minor in (versions.OLDEST, versions.NEWEST))
    for page in (README, ROOT / "docs" / "install.md"):
        assert f"transformers {oldest} to {newest}" in page.read_text()
    assert f'"transformers>={oldest},<6"' in (ROOT / "pyproject.toml").read_text()


def test_the_map_leads_to_every_page():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target.split("#")[0]).resolve() for target in links_of(index) if not OUTSIDE.match(target)}
    assert not [name_of(page) for page in PAGES if page != index and page.resolve() not in linked]


@pages
def test_every_link_leads_somewhere(page):
    broken = []
    for target in links_of(page):
        if not OUTSIDE.match(target):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            if not there.is_relative_to(ROOT) or not there.exists() or (anchor and anchor not in anchors_of(there)):
                broken.append(target)
    assert not broken


@pages
def test_links_out_are_whole_and_safe(page):
    assert not [target for target in links_of(page) if OUTSIDE.match(target) and not re.match(r"https://[\w.-]+\.\w+/", target)]


@pages
def test_lines_end_where_the_others_do(page):
    prose = [line for line in prose_of(page).splitlines() if not line.startswith("|")]
    assert not [line for line in prose if len(line) > WIDTH or line != line.rstrip()]


def commands(program):
    """`(place, words)` of every command line that begins so, in blocks and between backticks."""
    for page in PAGES:
        for span in spans_of_code(page):
            if span.startswith(program):
                yield name_of(page), shlex.split(span)
    for each in every_block():
        if each.language in ("bash", "sh", "shell", "console"):
            for line in each.text.replace("\\\n", " ").splitlines():
                for part in line.removeprefix("$ ").split("&&"):
                    begun = part.strip().removeprefix(".venv/bin/")
                    if begun.startswith(program):
                        yield each.place, shlex.split(begun, comments=True)


def parses(words):
    try:
        make_parser().parse_args(words)
    except SystemExit as end:
        return not end.code  # --version and --help end well
    return True


def test_every_command_line_of_hf_steer_parses():
    """A command by itself is only named, since some need arguments."""
    found, names = list(commands("hf-steer ")), {command.name for command in COMMANDS}
    assert len(found) > 30
    assert not [(place, words) for place, (_, *words) in found if words[0] not in names | {"--version", "--help"}]
    assert not [(place, words) for place, (_, *words) in found if len(words) > 1 and not parses(words)]
    assert names <= {words[1] for _, words in found}


def test_every_script_and_test_that_is_named_is_there_with_its_options():
    found = [*commands("python examples/"), *commands("pytest ")]
    assert len(found) >= 5
    for place, (_, *words) in found:
        files = [ROOT / word for word in words if "/" in word]
        assert all(file.exists() for file in files), f"{place}: {words}"
        if words[0].startswith("examples/"):
            assert not [word for word in words if word.startswith("--") and f'"{word}"' not in files[0].read_text()], place


def test_paths_of_the_project_that_pages_and_checks_name_are_there():
    """Between backticks in prose, and anywhere in the files that run the checks."""
    known = re.compile(r"(?:hf_steer|examples|tests|docs|\.ci|\.github)/[\w./-]*\w")
    said = {(name_of(page), path) for page in PAGES for span in spans_of_code(page) for path in known.findall(span)}
    for file in (ROOT / ".ci" / "run", *(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"):
        said |= {(file.name, path) for path in known.findall(file.read_text())}
    written = {"hf_steer/steer_model.safetensors"}  # by a save
    assert len(said) > 15
    assert not [(place, path) for place, path in said if path not in written and not (ROOT / path).exists()]


def test_the_citation_names_this_version():
    assert f"version = {{{hf_steer.__version__}}}" in block("bibtex")
