"""The recipes for extending are followed to the letter: each block of each page, in order, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from kit.plugins import EXAMPLE, ROOT, tables_as_they_were
from kit.tiny import make_model, make_prompt
from kit.tiny_encoders import labels_for, make_encoder_inputs, make_encoder_model

from hf_steer.registry import TABLES

PAGES = sorted((ROOT / "docs" / "extending").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAMES = {"backend": "written_out", "family": "smollm3", "gate": "doubt", "router": "low_rank", "source": "novelty"}
A_PAGE = 95
"""Lines."""


def given(noun: str) -> dict[str, object]:
    """What a page takes for granted: a model, a prompt, where to look, what to say."""
    torch.manual_seed(0)
    if noun in ("router", "source"):
        inputs = make_encoder_inputs("qwen2_vl")
        model = make_encoder_model("qwen2_vl")
        return {"model": model, "inputs": inputs, "labels": labels_for("qwen2_vl", inputs)}
    model = make_model("smollm3" if noun == "family" else "qwen2")
    inputs = make_prompt("qwen2", [[9]])
    return {"model": model, "inputs": inputs, "scores": torch.randn(inputs["input_ids"].shape)}


def blocks_of(page: Path, language: str) -> list[str]:
    return [code for own, code in BLOCK.findall(page.read_text()) if own == language]


def follow(page: Path) -> dict[str, object]:
    """Run the page's code from top to bottom, and the test that it ends in."""
    known = given(page.stem)
    for number, code in enumerate(blocks_of(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec", dont_inherit=True), known)
    tests = [value for name, value in known.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()
    return known


def patched(diff: str) -> tuple[Path, str]:
    """A file of ours with the added lines of a diff, at the one place where its other lines are."""
    head, *lines = diff.splitlines()
    path = ROOT / head.removeprefix("+++ b/")
    context = "".join(f"{line[1:]}\n" for line in lines if line[0] == " ")
    text = path.read_text()
    assert text.count(context) == 1, f"{path.name} has no such place any more"
    return path, text.replace(context, "".join(f"{line[1:]}\n" for line in lines))


def test_there_is_a_page_for_each_table():
    assert {page.stem for page in PAGES} == set(TABLES) == set(NAMES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_recipe_that_is_followed_to_the_letter_works(page):
    table, name = TABLES[page.stem], NAMES[page.stem]
    assert name not in set(table)
    with tables_as_they_were():
        known = follow(page)
        added = table[name]
        (diff,) = blocks_of(page, "diff")
        path, text = patched(diff)
        known |= {"__name__": ".".join(path.relative_to(ROOT).with_suffix("").parts)}
        exec(compile(text, str(path), "exec", dont_inherit=True), known)
        assert known["OURS"][name] == added
        assert set(known["OURS"]) == set(table) - {own for own in table if not table.is_ours(own)} | {name}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_recipe_is_a_page_and_names_the_entry_point_of_the_example(page):
    assert len(page.read_text().splitlines()) <= A_PAGE
    (toml,) = blocks_of(page, "toml")
    assert toml in (EXAMPLE / "pyproject.toml").read_text()
