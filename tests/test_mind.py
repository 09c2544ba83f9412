"""A small tower, a decoder and a gaze, `examples/real/mind.py`: it runs on stand-ins, and nothing of the report is trained on."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def part(monkeypatch):
    """A module of the example, by name."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "real")
    return importlib.import_module


@pytest.fixture
def painter(part):
    pictures = part("mind_standins").draw_pictures()
    return part("mind_scenes").Painter(np.stack([pictures["twitter"], pictures["google"]]), 0)


def test_the_whole_of_it_runs_on_stand_ins_goes_on_where_it_was_and_writes_its_table_and_picture(tmp_path):
    command = [sys.executable, "examples/real/mind.py", "--preset", "quick", "--threads", "1", "--cache", str(tmp_path / "cache")]
    command += ["--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=300)
    rows = list(csv.DictReader((tmp_path / "mind.csv").read_text().splitlines()))
    assert {row["table"] for row in rows} == {"tower", "choosing", "pointing", "text", "saved", "aligners"}
    kept = {row["table"]: float(row["right"]) for row in rows if row["table"] in ("text", "saved")}
    assert kept["text"] == 1
    assert kept["saved"] == 1
    names = " ".join(row["condition"] for row in rows if row["table"] == "pointing")
    assert all(control in names for control in ("unsteered", "other", "shuffled", "uniform", "same layers", "anywhere", "unseen"))
    kinds = {row["condition"].partition(":")[0] for row in rows if row["table"] == "aligners"}
    assert kinds == {"linear alone", "simple", "hierarchical", "progressive"}
    assert all(row["run"] and row["transformers"] and row["date"] for row in rows)
    assert (tmp_path / "mind.png").stat().st_size > 5000


def test_four_names_of_the_report_stand_together_in_no_other_split(part, painter):
    split_of = part("mind_scenes").split_of
    for split in ("training", "choosing", "report"):
        assert {split_of(painter.four(split).names) for _ in range(20)} == {split}
    assert split_of((3, 1, 2, 0)) == split_of((0, 1, 2, 3))


def test_a_patch_bears_the_name_of_what_lies_on_it(part):
    scene = part("mind_scenes").Scene(np.zeros((96, 96, 3), np.uint8), (5, 7), (), ((0, 0, 32, 16), (47, 48, 96, 96)))
    labels = part("mind_tower").names_of_patches([scene]).reshape(6, 6)
    assert labels[0].tolist() == [5, 5, -100, -100, -100, -100]
    assert labels[3:, 3:].unique().tolist() == [7]
    assert (labels[1:3] == -100).all()
    assert (labels[3:, :3] == -100).all()


def test_training_sees_the_pixels_that_the_processor_makes(part, painter):
    tower, scene = part("mind_tower"), painter.four("training")
    made = tower.processor_of_tower()(scene.image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(tower.pixels_of([scene]), made)


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("The picture shows a cat.", "cat"),
        ("The picture shows an egg.", "egg"),
        ("The picture shows a cat a cat a", None),
        ("cat.", None),
    ],
)
def test_an_answer_names_a_word_or_none(part, answer, word):
    assert part("mind_training").named(answer) == word


def test_an_archive_that_is_not_what_it_was_is_refused(part, tmp_path):
    pictures = part("mind_pictures")
    for package in ("emoji-datasource-twitter-16.0.0", "emoji-datasource-google-16.0.0", "lobehub-fluent-emoji-3d-1.1.0"):
        (tmp_path / f"{package}.tgz").write_bytes(b"something else")
    with pytest.raises(pictures.Missing, match="sha256"):
        pictures.fetch_pictures(tmp_path)


def test_random_heads_are_as_many_in_the_same_layers_or_anywhere(part):
    drawn = part("mind_pointing").random_heads
    like = {3: (0, 1), 7: (4,)}
    assert {layer: len(heads) for layer, heads in drawn(like, 9, 0).items()} == {3: 2, 7: 1}
    assert sum(map(len, drawn(like, 9, 0, layers=30).values())) == 3
    assert drawn(like, 9, 0) != drawn(like, 9, 1)
