"""Every Python block of the pages runs as it stands, and prints what the page says that it prints."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from kit.documents import ROOT, every_block

CONTINUES, PRINTS, UNRUN = ", goes on", " output", "not run: "
SHOWN_ELSEWHERE = ("demo output", "heads output")
"""What commands print that take longer than a block may; `test_quoted_figures.py` holds them to the commands' files."""
SEAM = "\x1e"


def scripts():
    """Name -> its parts in their order: pairs of code, and what it has printed at its end (None: that comes later)."""
    found = {}
    for block in every_block():
        name = block.marker.removesuffix(CONTINUES)
        if block.language == "python" and not block.marker.startswith(UNRUN):
            assert (name in found) == block.marker.endswith(CONTINUES), f"{block.place}: {block.marker!r}"
            found.setdefault(name, []).append([block.text, None])
        elif block.marker.endswith(PRINTS) and block.marker not in SHOWN_ELSEWHERE:
            found[block.marker.removesuffix(PRINTS)][-1][1] = block.text
    return found


SCRIPTS = scripts()


def test_every_python_block_has_a_name_or_says_why_it_is_not_run():
    python = [block for block in every_block() if block.language in ("python", "py", "pycon")]
    assert not [block.place for block in python if not block.marker or block.language != "python"]
    assert all(len(block.marker) > len(UNRUN) + 10 for block in python if block.marker.startswith(UNRUN))
    assert {"quickstart", "align", "questions"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_blocks_run_as_pasted_and_print_what_the_page_shows(name, tmp_path):
    """In an empty folder, where only a script that names the clone's examples finds them."""
    parts = SCRIPTS[name]
    if "examples/" in "".join(code for code, _ in parts):
        (tmp_path / "examples").symlink_to(ROOT / "examples")
    code = "".join(f"{part}\nprint({SEAM!r}, end='')\n" for part, _ in parts)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    shown = ""
    for printed, (_, expected) in zip(run.stdout.split(SEAM), parts, strict=False):
        shown += printed
        if expected is not None:
            assert shown == expected
            shown = ""
    assert shown == "", "the page does not show this"
