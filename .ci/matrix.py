"""Runs the tests of `TESTS` on every set of versions in `SETS`; the README's test command has run all of them on the newest.

A set names what is old on purpose. pip resolves the rest against `.venv` and installs the few packages that differ into a folder
that comes first on the path: no second torch, seconds per set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv" / "bin" / "python"

SETS = {
    "oldest": ["transformers==5.14.0"],  # the lower bound of pyproject.toml: `position_bias` begins here
    "middle": ["transformers==5.18.0"],  # `generate` encodes pictures before the first pass from here on
    "old-cache-name": ["transformers==5.23.0"],  # the last before `past_key_values` became `cache`
}
"""Name -> requirements. No other file names a version to test on."""

NEEDS_PYTHON = {"old-cache-name": (3, 11)}
"""Name -> the first Python that pip finds its packages for, where that is a later one than ours: transformers 5.21 began it."""

TESTS = {
    "contract": ["test_contract*.py", "test_gaze*.py"],
    "files": ["test_*files*.py", "test_save*.py", "test_kept*.py"],
    "conversations": ["test_conversations*.py"],
    "ground": ["ground/**/test_*.py"],
    "applied or an error": ["open/test_*.py"],
}
"""What is run -> patterns of files, in `tests` or any folder below it; files that match join by themselves."""

LOCKED = ("torch", "torchvision")
"""Gigabytes each: a set that needs another one is an error."""

VERSIONS = """
import importlib.metadata as installed, sys, transformers
names = sorted({*sys.argv[2:], "torch", "transformers", "tokenizers", "huggingface_hub", "accelerate", "peft"})
print("  python", sys.version.split()[0], *(f"{name} {installed.version(name)}" for name in names), sep="  ")
if len(sys.argv) > 2 and not transformers.__file__.startswith(sys.argv[1]):
    sys.exit(f"transformers comes from {transformers.__file__}, not from the overlay {sys.argv[1]}")
"""


def main(names: list[str]) -> None:
    """Run the sets of these names, all without a name, and exit with an error if a test failed on one."""
    unknown = set(names) - set(SETS)
    if unknown:
        sys.exit(f"no sets {sorted(unknown)} in .ci/matrix.py; there are {list(SETS)}")
    if not PYTHON.exists():
        sys.exit("no .venv here: the README's test command makes it; .ci/run runs that first")
    run_pip("install", "--quiet", "pip>=22.2")  # the first with --dry-run; Ubuntu 22.04 has an older one
    there = [name for name in names or SETS if NEEDS_PYTHON.get(name, (3,)) <= sys.version_info]
    for name in set(names or SETS) - set(there):
        print(f"+ {name}: passed over, its packages need Python {'.'.join(map(str, NEEDS_PYTHON[name]))}", flush=True)
    failed = [name for name in there if not passes(name)]
    if failed:
        sys.exit(f"tests failed on these sets of versions: {failed}")


def passes(name: str) -> bool:
    """Lay a set's packages over those of `.venv` and run the tests on them."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hf_steer_") as overlay:
        pinned = lay(SETS[name], overlay)
        environment = {**os.environ, "PYTHONPATH": overlay}
        print(f"+ {name}: {' '.join(pinned) or 'as in .venv'}", flush=True)
        subprocess.run([PYTHON, "-c", VERSIONS, overlay, *pinned_names(pinned)], env=environment, check=True)
        laid = time.monotonic()
        tests = subprocess.run([PYTHON, "-m", "pytest", *files()], cwd=ROOT, env=environment)
    print(f"  {laid - begun:.0f} s to lay, {time.monotonic() - laid:.0f} s of tests, exit {tests.returncode}", flush=True)
    return tests.returncode == 0


def lay(requirements: list[str], overlay: str) -> list[str]:
    """Install what these requirements change in `.venv` into a folder of its own, and return it pinned."""
    planned = json.loads(run_pip("install", "--quiet", "--dry-run", "--report", "-", *requirements))["install"]
    pinned = [f"{package['metadata']['name']}=={package['metadata']['version']}" for package in planned]
    heavy = [package for package in pinned if package.split("==")[0] in LOCKED]
    if heavy:
        sys.exit(f"{requirements} would replace {heavy}, which an overlay must not; choose versions that take the one in .venv")
    if pinned:
        run_pip("install", "--quiet", "--no-deps", "--no-compile", "--target", overlay, *pinned)
    return pinned


def pinned_names(pinned: list[str]) -> list[str]:
    return [package.split("==")[0] for package in pinned]


def files() -> list[str]:
    """Every file of `TESTS`; a kind of tests without a file is an error."""
    found = {kind: sorted(path for each in patterns for path in (ROOT / "tests").rglob(each)) for kind, patterns in TESTS.items()}
    missing = [kind for kind, paths in found.items() if not paths]
    if missing:
        sys.exit(f"no test file matches {({kind: TESTS[kind] for kind in missing})}; see TESTS in .ci/matrix.py")
    return sorted({str(path.relative_to(ROOT)) for paths in found.values() for path in paths})


def run_pip(*arguments: str) -> str:
    return subprocess.run([PYTHON, "-m", "pip", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main(sys.argv[1:])
