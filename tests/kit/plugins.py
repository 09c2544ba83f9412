"""Plugins for tests: packages as an installer leaves them, and tables that are afterwards as they were."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_steer.registry import TABLES

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plugin"
GATE = """
import hf_steer

def register():
    gate = hf_steer.Gate(measures=lambda logits: logits[:, 0], options={{"threshold": 0.5, "release": 0.4}})
    hf_steer.register_gate({name!r}, gate)
"""
"""Code of a plugin with one gate."""
BROKEN = """
import hf_steer

def register():
    {first}
    import nothing_of_this_name
"""


@contextmanager
def tables_as_they_were() -> Iterator[None]:
    """Rows that are added inside are taken out again."""
    before = {noun: set(table) for noun, table in TABLES.items()}
    try:
        yield
    finally:
        for noun, table in TABLES.items():
            for name in set(table) - before[noun]:
                table.remove(name)


def lay_out(folder: Path, package: str, code: str, *, value: str | None = None, version: str = "1.0") -> None:
    """A package of one module as an installer leaves it in a folder of `sys.path`, with one entry point.

    Args:
        folder: made when it is not there.
        package: its name; the module's is the same with underscores.
        code: of the module.
        value: what the entry point names; the module's `register` when None.
        version: of the package.
    """
    module = package.replace("-", "_")
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[hf_steer.plugins]\n{package} = {value or f'{module}:register'}\n")
    (info / "RECORD").write_text(f"{module}.py,,\n")


def install(source: Path, target: Path) -> None:
    """Install a package into a folder with pip, without a network."""
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
        "--disable-pip-version-check", "--target", str(target), str(source),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
