"""Every figure that the pages quote is the one in the file that a command wrote."""

from __future__ import annotations

import csv
import json
import re
import statistics

from kit.documents import PAGES, README, ROOT, block, words_of
from kit.real import real

from hf_steer.analysis.heads import HeadResult
from hf_steer.analysis.heads.ready import LISTS

FIGURES, BENCHMARKS, DOCS = ROOT / "examples" / "figures", ROOT / "examples" / "benchmarks", ROOT / "docs"
EVIDENCE, BACKENDS = words_of(DOCS / "evidence.md"), words_of(DOCS / "backends.md")


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_readme_shows_the_demos_own_table():
    shown = block("demo output")
    table = rows_of(FIGURES / "pointing.csv")
    assert len(table) == 11
    for row in table:
        names = ("strength", "pointed_share", "low", "high", "readable_share", "kl_nats")
        strength, share, low, high, readable, kl = (float(row[name]) for name in names)
        figures = f"{share:>5.2f}  {f'[{low:.2f}, {high:.2f}]':<21}{readable:>20.2f}{kl:>12.3f}"
        assert f"{row['saliency']:<18}{strength:>4g}   {figures}" in shown
    assert "demo output" in README.read_text()


def test_the_heads_own_table_is_shown():
    result = HeadResult.from_json((FIGURES / "heads.json").read_text())
    assert str(result).startswith(block("heads output").rstrip())
    assert result.report.chosen.value >= 0.85


SHARE = re.compile(r"(\d\.\d\d)\s+\[(\d\.\d\d), (\d\.\d\d)\]")


def written_shares():
    """All values with an interval that the commands wrote, as they are printed."""
    ends = {
        "pointing.csv": ("pointed_share", "low", "high"), "steering.csv": ("right", "low", "high"),
        "bench-cpu.csv": ("ratio", "ratio_p20", "ratio_p80"),
    }  # fmt: skip
    for folder in (FIGURES, BENCHMARKS):
        for path in folder.glob("*.csv"):
            rows = [row for row in rows_of(path) if path.name in ends and row.get("split", "report") == "report"]
            yield from (tuple(f"{float(row[name]):.2f}" for name in ends[path.name]) for row in rows if row[ends[path.name][0]])
    heard = [row for row in rows_of(FIGURES / "listen.csv") if row["split"] == "report"]
    for name in ("right", "recall", "share", "wer", "wer_more"):
        yield from (tuple(f"{float(row[f'{name}{end}']):.2f}" for end in ("", "_low", "_high")) for row in heard if row[name])
    for row in (*rows_of(FIGURES / "pointing_text.csv"), *rows_of(FIGURES / "pointing_text_choose.csv")):
        yield tuple(f"{float(row[name]):.2f}" for name in ("right", "low", "high"))
    for row in rows_of(FIGURES / "mind.csv"):
        for name in ("right", "boxed"):
            if row[f"{name}_low"]:
                yield tuple(f"{float(row[f'{name}{end}']):.2f}" for end in ("", "_low", "_high"))
    for path in (FIGURES / "heads.json", *LISTS.glob("*.json")):
        report = json.loads(path.read_text())["report"]
        estimates = [value for value in report.values() if isinstance(value, dict)]
        yield from (tuple(f"{own[end]:.2f}" for end in ("value", "low", "high")) for own in estimates)


def test_every_share_with_an_interval_was_written_by_a_command():
    known = set(written_shares())
    quoted = [share for page in PAGES for share in SHARE.findall(page.read_text())]
    assert len(quoted) >= 50
    assert not [share for share in quoted if share not in known]


def test_the_ablations_own_table_is_shown():
    table = rows_of(FIGURES / "align_summary.csv")
    assert len(table) == 21
    for row in table:
        if row["experts"] in ("0", "8"):
            rate, low, high = (100 * float(row[name]) for name in ("error_rate", "low", "high"))
            less, less_low, less_high = (100 * float(row[f"less_linear{end}"]) for end in ("", "_low", "_high"))
            cells = f"{rate:.1f} [{low:.1f}, {high:.1f}] | {less:+.1f} [{less_low:+.1f}, {less_high:+.1f}]"
            assert cells in EVIDENCE or row["aligner"] == "linear alone", cells
            assert f"{rate:.1f} [{low:.1f}, {high:.1f}]" in EVIDENCE


def test_intervals_that_leave_out_zero_are_counted():
    table = rows_of(FIGURES / "align_summary.csv")[1:]
    apart = [row for row in table if float(row["less_linear_low"]) > 0 or float(row["less_linear_high"]) < 0]
    assert len(table) == 20
    assert len(apart) == 1
    less, low, high = (100 * float(apart[0][f"less_linear{end}"]) for end in ("", "_low", "_high"))
    assert f"({apart[0]['aligner']}, {apart[0]['experts']} experts: {less:+.1f} [{low:+.1f}, {high:+.1f}])" in EVIDENCE
    assert "one 95 % interval leaves out zero" in EVIDENCE


def test_the_speed_of_the_aligners_is_quoted():
    for row in rows_of(BENCHMARKS / "aligners-cpu.csv"):
        if row["pass"] == "forward" and row["dtype"] == "float32":
            assert f"{row['aligner']} {float(row['ratio']):.1f}" in EVIDENCE, row["aligner"]


SHOWN = ("hf_steer", "dense mask", "position_bias", "edited weights")


def bench_rows():
    return rows_of(BENCHMARKS / "bench-cpu.csv")


def bench_table(rows):
    """The page's table: Qwen2-VL-2B's shape, times the plain model's time, as the benchmark wrote it."""
    cells = {}
    for row in rows:
        if row["shape"] == "qwen2-vl-2b" and row["level"] in ("attention", "model") and row["phase"] != "training":
            place = row["level"], row["phase"], int(row["batch"]), int(row["tokens"]), row["dtype"]
            cells.setdefault(place, {})[row["contender"]] = row
    lines = []
    for (level, phase, batch, tokens, dtype), found in cells.items():
        ours = found["hf_steer"]
        first = f"{float(ours['ratio']):.2f} [{float(ours['ratio_p20']):.2f}, {float(ours['ratio_p80']):.2f}]"
        others = [f"{float(found[name]['ratio']):.2f}" if name in found else "" for name in SHOWN[1:]]
        where = f"{level}, {phase}" + (f", batch {batch}" if batch > 1 else "")
        lines.append("| " + " | ".join([where, str(tokens), dtype, first, *others]) + " |")
    return lines


def test_the_benchmarks_own_table_is_shown_and_its_bars_are_counted():
    rows = bench_rows()
    lines = bench_table(rows)
    assert len(lines) == 24
    for line in lines:
        assert line in BACKENDS
    held = [row for row in rows if row["holds"]]
    steered = [row for row in held if row["contender"] == "hf_steer"]
    kept = sum(row["holds"] == "True" for row in held), sum(row["holds"] == "True" for row in steered)
    assert f"{kept[1]} of its {len(steered)} rows" in BACKENDS
    assert f"{kept[0]} of all {len(held)}" in BACKENDS
    off = [
        float(row["ratio"]) for row in rows
        if row["contender"] in ("hf_steer disabled", "hf_steer strength 0") and row["phase"] in ("prefill", "decode")
    ]  # fmt: skip
    assert f"the median of its {len(off)} cells is {statistics.median(off):.3f}" in BACKENDS
    (patching,) = (row for row in rows if row["level"] == "patching")
    assert f"takes {float(patching['ms']):.1f} ms" in BACKENDS
    assert max(float(row["error_ratio"]) for row in rows if row["contender"] == "hf_steer" and row["error_ratio"]) < 4


def test_the_second_run_is_quoted():
    table = rows_of(BENCHMARKS / "bench-cpu-prefill.csv")
    ours = [row for row in table if (row["level"], row["contender"]) == ("model", "hf_steer")]
    again = {(row["tokens"], row["dtype"]): float(row["ratio"]) for row in ours}
    first, second, third, fourth = (f"{ratio:.2f}" for ratio in again.values())
    assert f"reads {first}, {second}, {third} and {fourth} for 1024 and 4096 tokens" in BACKENDS
    once = {
        (row["tokens"], row["dtype"]): float(row["ratio"]) for row in bench_rows()
        if (row["level"], row["shape"], row["phase"], row["contender"]) == ("model", "qwen2-vl-2b", "prefill", "hf_steer")
    }  # fmt: skip
    assert list(once) == list(again)
    assert all(min(once[place], again[place]) <= 1.05 for place in once)


def test_the_table_of_listening_is_shown():
    rows = rows_of(FIGURES / "listen.csv")
    assert real("listen").as_markdown(rows) in (DOCS / "evidence.md").read_text()
    said = {row["said"] for row in rows if row["split"] == "report"}
    assert said >= {"nothing", "pointed-at", "another phrase", "shuffled"}
    assert all(int(row["sounds"]) >= 100 for row in rows if row["split"] == "report" and row["task"] != "beams")
