"""`import hf_steer` is cheap, fetches what is asked for, and does not mind who imported what before."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import hf_steer

ROOT = Path(hf_steer.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if path.parent.name != "harness" or find_spec("lm_eval")  # an extra of its own
)


FORGET = """
import gc, sys
from importlib import import_module
gc.disable()
import torch, transformers

def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "hf_steer"]:
        del sys.modules[name]
"""


def run(code, **environment):
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def run_afresh(snippets):
    """Each as if nothing of ours had been imported yet, in one process that keeps torch and transformers."""
    run("\n".join([FORGET, *(f"forget(); exec({snippet!r}, {{}})" for snippet in snippets)]))


def stub_lines():
    """(module, name) of what type checkers see; a room of ours has no module."""
    for node in ast.parse((ROOT / "__init__.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.name == alias.asname, f"{alias.name}: strict type checkers take `X as X` alone for a public name"
                yield node.module, alias.name


@pytest.mark.parametrize("module", ["hf_steer", "hf_steer.errors", "hf_steer.config", "hf_steer.files", "hf_steer.cli"])
def test_what_needs_no_torch_imports_none(module):
    heavy = "('torch', 'transformers', 'numpy', 'huggingface_hub', 'matplotlib', 'PIL', 'tqdm', 'psutil')"
    run(f"import sys, {module}; found = [name for name in {heavy} if name in sys.modules]; assert not found, found")


def test_type_checkers_see_the_names_that_are_there():
    names = {name for module, name in stub_lines() if module != "hf_steer"}
    assert names == set(hf_steer.__all__), "a public name wants a row in `__init__.py` and a line in `__init__.pyi`"
    for module, name in stub_lines():
        if module == "hf_steer":
            assert getattr(hf_steer, name) is import_module(f"hf_steer.{name}")
        else:
            assert getattr(hf_steer, name) is getattr(import_module(module), name)


def test_every_public_name_is_listed_before_it_is_fetched():
    run("import hf_steer; assert set(hf_steer.__all__) <= set(dir(hf_steer)); assert '__version__' in dir(hf_steer)")
    assert hf_steer.__all__ == sorted(hf_steer.__all__)


def test_every_way_of_asking_works():
    run_afresh(
        [
            "from hf_steer import patch_model; patch_model",
            "import hf_steer; hf_steer.patch_model",
            "import hf_steer; hf_steer.analysis.simulate",
            "import hf_steer; hf_steer.training.collect_balance",
            "import hf_steer.evidence.pointing; hf_steer.evidence.pointing.run_pointing",
            "import hf_steer.patching; hf_steer.patching.patch_model; hf_steer.unpatch_model",
            "import hf_steer.patching as patching; patching.patch_model",
            "from hf_steer import gating, values, families, saving; gating.__name__",
            "from hf_steer import *; patch_model, SteerConfig, compose",
        ]
    )


def test_rooms_are_attributes_without_an_import_of_their_own():
    rooms = sorted({name.split(".")[1] for name in MODULES if "." in name} - {"compose", "verify"})
    assert {"analysis", "patching", "training", "errors"} <= set(rooms)
    run_afresh(f"import hf_steer; assert hf_steer.{room}.__name__ == 'hf_steer.{room}'" for room in rooms)


def test_a_name_that_is_not_there_is_an_attribute_error():
    for name in ("patch_modle", "_private", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"module 'hf_steer' has no attribute '{name}'"):
            getattr(hf_steer, name)
    with pytest.raises(ImportError, match="cannot import name 'patch_modle' from 'hf_steer'"):
        exec("from hf_steer import patch_modle")


def test_a_room_that_lacks_a_package_says_which_one():
    """Not that hf_steer has no such attribute."""
    run(
        "import sys; sys.modules['safetensors'] = None\n"
        "import hf_steer\n"
        "try: hf_steer.io\n"
        "except ModuleNotFoundError as error: assert 'safetensors' in str(error)\n"
        "else: raise AssertionError\n"
    )


def test_a_public_name_is_no_module_whatever_was_imported_before():
    """`compose` is a function, and a package of ours has its name."""
    run_afresh(
        f"import {first}, hf_steer, types\n"
        "from hf_steer.compose import StackingProcessor\n"
        "from hf_steer import compose\n"
        "assert isinstance(compose, types.FunctionType) and hf_steer.compose is compose\n"
        "hf_steer.compose = len\n"  # a user's own, or a mock
        "assert hf_steer.compose is len\n"
        for first in ("hf_steer.compose", "hf_steer.compose.join", "hf_steer.patching")
    )


def test_every_module_can_be_the_first_that_is_imported(tmp_path):
    lines = [FORGET, *(f"import_module({name!r})" for name in MODULES)]  # what others they import need not be imported again
    lines += [f"forget(); import_module({name!r})" for name in MODULES]
    run("\n".join(lines), PYTHONPYCACHEPREFIX=str(tmp_path), PYTHONDONTWRITEBYTECODE="")
