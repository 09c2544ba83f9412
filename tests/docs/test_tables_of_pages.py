"""Tables of the pages that repeat one of the package's own tables say the same, and every choice is named somewhere."""

from __future__ import annotations

import ast

import pytest
from kit.documents import PAGES, README, ROOT, table_under, words_of
from kit.tiny_encoders import ENCODING, make_encoder_model

import hf_steer
from hf_steer.attention import BACKENDS
from hf_steer.cli.main import COMMANDS
from hf_steer.config.attention import NORMALIZATIONS, QUERIES
from hf_steer.families import FAMILIES, resolve
from hf_steer.ground.towers import PLACEMENTS
from hf_steer.registry import GATES, ROUTERS, SOURCES

DOCS = ROOT / "docs"
SHOWN = (*ENCODING, "audioflamingo3")
"""Whose encoders the page names; others are found as well."""
NAMED = {
    "kind of aligner": ROUTERS, "source": SOURCES, "normalization": NORMALIZATIONS,
    "queries": QUERIES, "gate": GATES, "backend": BACKENDS,
}  # fmt: skip


def row_of(model_type):
    """What the page says of a family after its name."""
    row = FAMILIES[model_type]
    encoders = resolve(make_encoder_model(model_type)).encoders if model_type in SHOWN else {}
    places = [
        f"{modality}: {', '.join(place for place in PLACEMENTS if place not in encoder.lacks)}"
        for modality, encoder in encoders.items()
    ]
    return [
        f"`{model_type}`", ", ".join(row.placeholders), "yes" if row.blocks else "",
        "; ".join(places), "yes" if row.composes else "",
    ]  # fmt: skip


def test_the_page_of_families_says_what_the_table_of_families_says():
    said = {row[1]: row[1:] for row in table_under(DOCS / "families.md", "families")}
    for model_type in FAMILIES:
        assert said.pop(f"`{model_type}`", None) == row_of(model_type), "write: | NAME | " + " | ".join(row_of(model_type)) + " |"
    assert said == {}


def test_the_page_of_backends_has_a_row_for_each_with_what_it_runs_over():
    said = {row[0]: row[2] for row in table_under(DOCS / "backends.md", "backends")}
    assert list(said) == [f'`"{name}"`' for name in BACKENDS]
    for name, backend in BACKENDS.items():
        assert set(said[f'`"{name}"`'].split(", ")) == {f"`{each}`" for each in backend.over}, name
    implementations = {each for backend in BACKENDS.values() for each in backend.over}
    assert not [each for each in implementations if f"`{each}`" not in words_of(README)]


@pytest.mark.parametrize("what", NAMED)
def test_every_choice_of_a_configuration_is_named(what):
    text = words_of(*PAGES)
    assert not [name for name in NAMED[what] if f'"{name}"' not in text]


def test_every_public_name_is_named():
    text = words_of(*PAGES)
    assert not [name for name in hf_steer.__all__ if name not in text]


def test_defaults_on_the_pages_are_those_of_the_code():
    aligners, gates = (table_under(DOCS / "aligners.md", "options"), table_under(DOCS / "heads-strength-when.md", "gates"))
    said = {}
    for names, _, values in aligners:
        said |= dict(zip(names.replace("`", "").split(", "), values.split(", "), strict=True))
    defaults = {name: value for row in ROUTERS.values() for name, value in row.options.items() if value is not None}
    assert len(defaults) > 8
    for name, value in defaults.items():
        shown = f'`"{value}"`' if isinstance(value, str) else f"`{value}`" if isinstance(value, bool) else f"{value:g}"
        assert said[name] == shown, name
    for kind, own in ((kind, row.options) for kind, row in GATES.items()):
        row = next(row for row in gates if row[0] == f'`"{kind}"`')
        assert all(f"`{name}={value!r}`".replace("'", '"') in row[2] for name, value in own.items()), kind


def test_the_page_of_the_command_line_has_a_section_for_each_command():
    text = (DOCS / "cli.md").read_text()
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert [command.name for command in COMMANDS] == [heading for heading in headings if heading.islower()]


def rooms():
    """Room -> the row of CONTRIBUTING's table that it is in."""
    rows = table_under(DOCS / "CONTRIBUTING.md", "rooms")
    return {name: number for number, row in enumerate(rows) for name in row[0].replace("`", "").split(", ")}


def test_contributing_names_every_room_of_the_package():
    there = {path.stem for path in (ROOT / "hf_steer").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(rooms()) == there - {"__init__"}


def imported(path):
    """Rooms that a file imports, also inside its functions; not for type checking alone."""
    for statement in ast.parse(path.read_text()).body:
        if not (isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)):
            names = (node.module.split(".") for node in ast.walk(statement) if isinstance(node, ast.ImportFrom) and node.module)
            yield from (name[1] for name in names if name[0] == "hf_steer" and len(name) > 1)


def test_rooms_import_only_what_stands_above_them_in_contributing():
    order, package = rooms(), ROOT / "hf_steer"
    files = [path for path in package.rglob("*.py") if path != package / "__init__.py"]
    rooms_of = {path: path.relative_to(package).with_suffix("").parts[0] for path in files}
    below = [(path, room) for path in files for room in imported(path) if order[room] > order[rooms_of[path]]]
    assert not below
    assert len(files) > 100
