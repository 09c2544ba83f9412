"""The shape of the code itself: arrows that run one way, light imports, files that hold one idea."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent / "hf_steer"
ORDER = [
    {"errors"}, {"values", "saving"}, {"registry", "files", "embedded"}, {"config"}, {"ground"}, {"families"},
    {"saliency", "aligners", "gating", "gates"}, {"attention"}, {"patching"}, {"io", "provider"},
    {"compose", "training", "testing"}, {"verify"}, {"analysis"}, {"evidence"}, {"cli", "harness"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = sorted(ROOT.rglob("*.py"))
TEST_FILES = sorted(TESTS.rglob("*.py"))
BESIDE_ROOMS = {"kit", "open", "files", "docs", "cli"}
"""Folders of tests that need no room of the package: helpers, laws that hold across rooms, and what users read and run."""
MOST_LINES = 500


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(tree):
    """Our own rooms that a file imports anywhere, for type checking alone, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hf_steer."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "hf_steer":
            yield from (alias.name for alias in node.names if alias.name in RANK)


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py" or path.parent != ROOT], ids=str)
def test_imports_run_one_way(path):
    own = RANK[part_of(path)]
    for imported in imports_of(ast.parse(path.read_text())):
        assert RANK[imported] <= own, f"{path.name} imports {imported}, which is built on it"


def modules_of(tree, known):
    """Our own modules that a file imports anywhere, by their full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_steer."):
            full = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in known else node.module for name in full)


def circles_in(graph):
    """Modules from which one comes back to where one was."""
    reached = {name: set(below) for name, below in graph.items()}
    for middle in graph:
        for below in reached.values():
            if middle in below:
                below |= reached[middle]
    return sorted(name for name, below in reached.items() if name in below)


def test_no_import_goes_in_a_circle_not_even_for_type_checking():
    names = {}
    for path in FILES:
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {name: set(modules_of(ast.parse(path.read_text()), names)) & set(names) for name, path in names.items()}
    assert sum(map(len, graph.values())) > 500
    assert circles_in(graph) == []
    assert circles_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_nouns_that_cross_rooms_know_none_of_them():
    for room in ("values", "errors"):
        assert list(imports_of(ast.parse((ROOT / f"{room}.py").read_text()))) == []


@pytest.mark.parametrize("path", [path for path in FILES if "patching" not in path.parts], ids=str)
def test_only_patching_touches_foreign_modules(path):
    """`ground` alone sets attributes beside it, on copies of configurations and on outputs."""
    text = path.read_text()
    words = ["register_forward", "add_module(", *([] if "ground" in path.parts else ["_attn_implementation_internal", "setattr("])]
    for word in words:
        assert word not in text.replace("object.__setattr__(", ""), f"{path.name} holds {word}"


def test_importing_the_package_is_light_and_changes_nothing():
    code = (
        "import os, sys, transformers, transformers.modeling_utils as m, transformers.vision_utils\n"
        "before, loaded = dict(os.environ), set(sys.modules)\n"
        "import hf_steer\n"
        "for name in hf_steer.__all__: getattr(hf_steer, name)\n"
        "assert dict(os.environ) == before\n"
        "heavy = {'matplotlib', 'triton', 'torch.nn.attention.flex_attention', 'sklearn', 'qwen_vl_utils', 'PIL.Image'}\n"
        "assert not heavy & (set(sys.modules) - loaded), heavy & (set(sys.modules) - loaded)\n"
        "assert not [name for name in m.ALL_ATTENTION_FUNCTIONS if 'hf_steer' in name]\n"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_every_public_name_is_documented():
    import hf_steer

    for name in hf_steer.__all__:
        assert (getattr(hf_steer, name).__doc__ or "").strip(), name


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names_of(tree):
    """Functions, classes, methods, constants and attributes that a file of ours keeps to itself."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


PRIVATE = {name for path in FILES for name in private_names_of(ast.parse(path.read_text())) if is_private(name)}


def private_names_used(tree):
    """Line and name of all that a test takes of ours and that is private: imported, reached into, or named in a string.

    Names of torch and transformers that begin alike are no concern of ours.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hf_steer":
            found = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            found = [node.attr] if node.attr in PRIVATE else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            path = node.value.split(".")
            found = path if path[0] == "hf_steer" or node.value in PRIVATE else []
        else:
            found = []
        yield from ((node.lineno, name) for name in found if is_private(name) and name.isidentifier())


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_tests_see_the_package_from_outside_and_share_through_the_kit(path):
    tree = ast.parse(path.read_text())
    found = [f"line {line}: {name}" for line, name in private_names_used(tree)]
    assert not found, f"use what is public, or make a seam of it: {'; '.join(found)}"
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    shared = [name for name in modules if any(part.startswith("test_") or part == "conftest" for part in name.split("."))]
    assert not shared, f"what tests share lies in tests/kit, not in {', '.join(shared)}"
    assert len(path.read_text().splitlines()) <= MOST_LINES, "split it by what its tests say"


@pytest.mark.parametrize(
    "used",
    [
        "from hf_steer.saving import {}", "from hf_steer import saving\nsaving.{}", "model.part.{}()",
        "monkeypatch.setattr('hf_steer.saving.{}', None)", "monkeypatch.setattr(saving, '{}', None)",
    ],
)  # fmt: skip
def test_a_private_name_that_a_test_uses_is_found(used):
    name = min(PRIVATE)
    assert [found for _, found in private_names_used(ast.parse(used.format(name)))] == [name]


def test_private_names_of_others_are_no_concern_of_ours():
    theirs = "from torch._dynamo.utils import counters\nmodule._forward_hooks\nconfig._attn_implementation = 'eager'"
    assert not list(private_names_used(ast.parse(theirs)))


def test_tests_mirror_the_package():
    rooms = {path.relative_to(ROOT).with_suffix("").as_posix() for path in [*ROOT.rglob("*.py"), *ROOT.rglob("*")]}
    folders = {path.parent.relative_to(TESTS) for path in TEST_FILES if path.parent != TESTS}
    assert not {folder.as_posix() for folder in folders if folder.parts[0] not in BESIDE_ROOMS} - rooms
    names = [path.name for path in TEST_FILES]
    assert not {name for name in names if names.count(name) > 1}
