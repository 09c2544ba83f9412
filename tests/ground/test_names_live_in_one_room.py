"""Only `ground/` spells what transformers calls things: a renaming there is mended in one room, or found by this file."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_steer
from hf_steer.ground import parts
from hf_steer.ground.arguments import ARGUMENTS
from hf_steer.ground.settings import SETTINGS

ROOT = Path(hf_steer.__file__).parent
BRIDGES, TRAINING = ROOT / "compose" / "bridges.py", ROOT / "training.py"
"""They make configurations, and talk to Trainer, in their words."""
ZOO = ROOT / "testing" / "zoo"
"""It makes configurations and inputs of every model there is."""
FILES = [
    path for path in sorted(ROOT.rglob("*.py"))
    if "ground" not in path.parts and path not in (BRIDGES, TRAINING) and ZOO not in path.parents
]  # fmt: skip


def spellings(table: dict[str, tuple[str, ...]]) -> set[str]:
    """Those that are no ordinary words, and no words of ours."""
    every = {name for names in table.values() for name in names if "_" in name}
    return every - set(ARGUMENTS) - set(SETTINGS)


OUR_FIELDS = {field.name for noun in (parts.Anatomy, parts.Encoder) for field in dataclasses.fields(noun)}
ARGUMENT_NAMES = spellings(ARGUMENTS)
SETTING_NAMES = spellings(SETTINGS) - ARGUMENT_NAMES - OUR_FIELDS
SETTLED = {("saliency/given.py", "from_text", "input_ids")}
"""Public parameters: file, function, name."""
NOWHERE = re.compile(r"past_key_values|mm_encoder_outputs|get_mask_sizes|_attn_implementation|cu_seq_lens|input_features_mask")
"""Not in docstrings or messages either: what changes most."""


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def names_in(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, kind and name of all that a file calls by a name that may be theirs."""
    tree = ast.parse(path.read_text())
    settled = {name for where, _, name in SETTLED if where == place(path)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, "string", node.value
        elif isinstance(node, ast.Attribute):
            yield node.lineno, "attribute", node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.value.lineno, "keyword", node.arg
        elif isinstance(node, ast.arg) and node.arg not in settled:
            yield node.lineno, "parameter", node.arg


def test_the_tables_hold_what_is_looked_for():
    assert {"input_ids", "attention_mask", "past_key_values", "pixel_values"} <= ARGUMENT_NAMES
    assert {"num_attention_heads", "vision_config", "vision_feature_layer"} <= SETTING_NAMES
    assert not {"labels", "cache", "image_sizes", "hidden_size", "head_dim"} & (ARGUMENT_NAMES | SETTING_NAMES)


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_argument_of_theirs_is_named_outside(path):
    found = [f"line {line}: {kind} {name}" for line, kind, name in names_in(path) if name in ARGUMENT_NAMES]
    assert not found, f"{place(path)} spells what hf_steer/ground/arguments.py has a word for: {'; '.join(found)}"


@pytest.mark.parametrize("path", [path for path in FILES if "bench" not in path.parts], ids=place)
def test_no_value_of_their_configurations_is_read_outside(path):
    """The benchmark makes models out of configurations, in their words."""
    named = [(line, kind, name) for line, kind, name in names_in(path) if kind in ("string", "attribute")]
    found = [f"line {line}: {kind} {name}" for line, kind, name in named if name in SETTING_NAMES]
    assert not found, f"{place(path)} spells what hf_steer/ground/settings.py has a word for: {'; '.join(found)}"


@pytest.mark.parametrize("path", FILES, ids=place)
def test_what_changes_from_version_to_version_is_not_even_mentioned_outside(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    found = [f"line {number}: {line.strip()}" for number, line in lines if NOWHERE.search(line)]
    assert not found, f"{place(path)}: take the name from ground (name_of): {'; '.join(found)}"


def test_settled_parameters_are_still_there():
    for where, function, name in SETTLED:
        tree = ast.parse((ROOT / where).read_text())
        (own,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
        assert name in {arg.arg for arg in ast.walk(own.args) if isinstance(arg, ast.arg)}
