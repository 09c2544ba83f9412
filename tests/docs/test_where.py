"""`docs/where.md` runs from top to bottom, and prints what it shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "where.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_runs_from_top_to_bottom_and_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named: dict[str, object] = {}
    printed = ""
    kinds = [kind for kind, _ in BLOCKS]
    assert set(kinds) == {"python", "text"}
    assert kinds.count("text") >= 8
    for kind, block in BLOCKS:
        if kind == "text":
            assert printed == block
            continue
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            here = block.replace('"examples/', f'"{ROOT}/examples/')  # the page writes where it runs
            exec(compile(here, "docs/where.md", "exec"), named)
        printed = told.getvalue()


def test_the_page_names_every_unit_and_every_way_to_say_where_in_a_picture():
    from hf_steer.saliency import UNITS

    assert [unit for unit in UNITS if f'| `"{unit}"`' not in PAGE] == []
    for name in ("from_boxes", "from_points", "from_scribble", "from_mask", "from_map", "external"):
        assert name in PAGE
