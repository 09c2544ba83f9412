"""Run transformers' own common tests on four models as they are, and patched so that nothing changes; compare test by test.

    python examples/common_tests                       # Llama, Qwen2-VL, Whisper, Qwen3-Next at λ = 0
    python examples/common_tests --gaze silent         # λ = 2, and nobody says where to look
    python examples/common_tests --models llama --json

pip fetches the source distribution of the installed transformers, which holds `tests/test_modeling_common.py`, into a cache folder
(`--cache`); `cases.py` brings the configurations and inputs of the models, `patched.py` patches every model that the tests make.
Exit code 1 when a test's outcome differs and `ALLOWED` does not say why.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS = {"llama": "LlamaTest", "qwen2_vl": "Qwen2VLTest", "whisper": "WhisperTest", "qwen3_next": "Qwen3NextTest"}
NEEDED = ("parameterized", "pytest", "peft", "accelerate")
RELOADED = (
    "AssertionError: Items in the first set",
    "counts the aligner's parameters among the base's, which the emptied base file is to miss; they were added after loading",
)
ALLOWED = {
    ("zero", "test_model_weights_reload_no_missing_tied_weights"): RELOADED,
    ("silent", "test_model_weights_reload_no_missing_tied_weights"): RELOADED,
    ("silent", "test_attn_implementation_composite_models"): (
        "ValueError: The eager model should not have",
        "asks each attention module's own configuration for its implementation's name, and a steered one has a name of its own",
    ),
}
"""(gaze, test) -> how the reason begins for which its outcome may differ, and why it may."""
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}
"""Modules that the common tests import, and that the source distribution lacks."""


def refuse_missing():
    """Exit with pip's command for what the tests import."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"the common tests need {', '.join(missing)}: pip install {' '.join(missing)}")


def fetch(cache, release):
    """A folder with `tests/` of a release of transformers; pip downloads it the first time."""
    folder = cache / f"transformers-{release}"
    if not (folder / "tests" / "test_modeling_common.py").exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, f"transformers=={release}", "--dest", str(cache)], check=True, timeout=600)
        with tarfile.open(cache / f"transformers-{release}.tar.gz") as archive:
            archive.extractall(cache, members=[one for one in archive if "/tests/" in one.name], filter="data")
    for name, text in STAND_INS.items():
        (folder / "tests" / name).parent.mkdir(exist_ok=True)
        (folder / "tests" / name).write_text(text)
        (folder / "tests" / name).with_name("__init__.py").touch()
    (folder / "tests" / "__init__.py").touch()  # before any other folder of that name
    return folder


def run(folder, models, gaze, timeout_seconds):
    """Test -> what became of it, as `patched.py` writes it down; `gaze` is empty for models as they are."""
    record = folder / f"record-{gaze or 'plain'}.json"
    record.unlink(missing_ok=True)
    paths = [folder, HERE, HERE.parents[1], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    names = {"COMMON_TESTS_RECORD": str(record), "COMMON_TESTS_PATCHED": gaze, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    chosen = [f"{HERE / 'cases.py'}::{MODELS[model]}" for model in models]
    options = ["-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider", "-p", "patched", "--disable-warnings", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--tb=line", *chosen], cwd=folder, timeout=timeout_seconds, text=True,
        capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **names},
    )  # fmt: skip
    if done.returncode not in (0, 1) or not record.exists():
        raise SystemExit(f"pytest did not run:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return json.loads(record.read_text())


def compare(plain, patched, model, gaze):
    """One row of the table."""
    own = [name for name in plain if name.startswith(f"{MODELS[model]}::")]
    differs = []
    for name in own:
        before, after = plain[name], patched.get(name, {"outcome": "missing", "reasons": []})
        if (before["outcome"], len(before["reasons"])) == (after["outcome"], len(after["reasons"])):
            continue
        test = name.split("::")[1]
        reason = next(iter(after["reasons"] or before["reasons"]), "")
        begins, why = ALLOWED.get((gaze, test), ("", None))
        differs.append(
            {"test": test, "plain": before["outcome"], "patched": after["outcome"], "reason": reason,
             "allowed": why if reason.startswith(begins) else None}
        )  # fmt: skip
    made = Counter()
    for name in own:
        made.update(patched[name]["models"] if name in patched else {})
    outcomes = Counter(plain[name]["outcome"] for name in own)
    return {
        "model": model, "tests": len(own), "same": len(own) - len(differs), "outcomes": outcomes,
        "models_patched": made.pop("patched", 0), "refused": dict(made), "differs": differs,
    }  # fmt: skip


def shown(rows):
    """The table in words."""
    yield f"{'model':<12}{'tests':>6}{'passed':>8}{'failed':>8}{'skipped':>9}{'same':>6}{'models patched':>16}"
    for row in rows:
        passed, failed, skipped = (row["outcomes"].get(name, 0) for name in ("passed", "failed", "skipped"))
        yield f"{row['model']:<12}{row['tests']:>6}{passed:>8}{failed:>8}{skipped:>9}{row['same']:>6}{row['models_patched']:>16}"
        for one in row["differs"]:
            yield f"    {one['test']}: {one['plain']}, patched {one['patched']}: {one['reason']}"
            yield f"        {'allowed: ' + one['allowed'] if one['allowed'] else 'NOT ALLOWED'}"
        for reason, count in row["refused"].items():
            yield f"    {count} not patched: {reason}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gaze", choices=("zero", "silent"), default="zero", help="λ = 0 with a source; λ = 2, nothing said")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "hf_steer" / "common_tests")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for either run")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    refuse_missing()
    release = version("transformers")
    folder = fetch(chosen.cache, release)
    plain, patched = (run(folder, chosen.models, gaze, chosen.timeout) for gaze in ("", chosen.gaze))
    rows = [compare(plain, patched, model, chosen.gaze) for model in chosen.models]
    if chosen.json:
        print(json.dumps({"transformers": release, "gaze": chosen.gaze, "models": rows}, indent=2))
    else:
        print(f"transformers {release}, tests/test_modeling_common.py, {chosen.gaze}", *shown(rows), sep="\n")
    failing = any(row["refused"] or not row["models_patched"] or not all(one["allowed"] for one in row["differs"]) for row in rows)
    return int(failing)


if __name__ == "__main__":
    sys.exit(main())
