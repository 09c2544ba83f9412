"""The shape of the code itself: arrows that run one way, light imports, files that hold one idea."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hf_steer"
ORDER = [
    {"errors"}, {"values", "saving"}, {"files", "embedded"}, {"config"}, {"ground"}, {"families"},
    {"saliency", "aligners", "gating"}, {"attention"}, {"patching"}, {"io", "provider"},
    {"compose", "training", "testing"}, {"analysis"}, {"evidence"}, {"cli"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(tree):
    """Our own modules that a file imports when it runs; imports for type checking alone do not count."""
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hf_steer."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "hf_steer":
            yield from (alias.name for alias in node.names if alias.name in RANK)


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py" or path.parent != ROOT], ids=str)
def test_imports_run_one_way(path):
    own = RANK[part_of(path)]
    for imported in imports_of(ast.parse(path.read_text())):
        assert RANK[imported] <= own, f"{path.name} imports {imported}, which is built on it"


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
