"""A sweep's rows are what its parts measure one by one; it can be cut short and gone on with, and never mixes two."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from kit.gazing import EVERYTHING, gaze, looking, prompt_for, steer
from kit.tiny import HEADS, SEEING, make_model
from PIL import Image

from hf_steer import ConfigError, FileError, PatchError, Saliency, SaliencyError, patch_model, unpatch_model, use_strength
from hf_steer.analysis import attention_metrics, measure_retention, sweep, sweep_strength
from hf_steer.analysis.plots import plot_sweep
from hf_steer.analysis.provenance import content_hash
from hf_steer.cli import main
from hf_steer.embedded import embedded_model_dir
from hf_steer.evidence.digits import load_digits, sample_scenes

SPAN = {True: "image", False: None}
PLACES = [(1, 0), (1, 3), *((2, head) for head in range(HEADS))]
"""Layers and heads that `steer` steers."""


def say(model, inputs, statement):
    with looking(model, statement):
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return tokens[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(("family", "implementation"), EVERYTHING)
def test_a_row_holds_what_its_parts_measure(family, implementation):
    inputs, model = prompt_for(family), make_model(family, implementation)
    statement, span = gaze(family, inputs), SPAN[family in SEEING]
    plain = say(model, inputs, None)
    patch_model(model, steer(family))
    found = sweep_strength(model, inputs, (0, 3.0), saliency=statement, span=span, new_tokens=4)
    assert [row.strength for row in found.rows] == [0.0, 3.0]
    with use_strength(model, 3.0):
        said = say(model, inputs, statement)
        kl = measure_retention(model, inputs, saliency=statement, new_tokens=4).kl_nats
        with looking(model, statement):
            metrics = attention_metrics(model, inputs, span=span)
    nothing, row = found.rows
    assert row.kl_nats == kl > 0.01
    for name, table in (
        ("attention_kl_nats", metrics.kl_nats), ("entropy_reduction_percent", metrics.entropy_reduction_percent),
        ("unsteered_span_mass", metrics.span_mass), ("span_mass", metrics.steered_span_mass),
    ):  # fmt: skip
        wanted = None if table is None else pytest.approx(sum(float(table[place]) for place in PLACES) / 6)
        assert getattr(row, name) == wanted
    assert (row.span_mass is None) == (span is None)
    assert row.answers_changed_share == sum(not torch.equal(a, b) for a, b in zip(plain, said, strict=True)) / 3
    assert row.tokens_changed_share == pytest.approx((plain != said).double().mean().item())
    assert row.tokens_changed_share > 0
    assert row.prompts == 3
    assert (nothing.kl_nats, nothing.attention_kl_nats, nothing.entropy_reduction_percent) == (0, 0, 0)
    assert (nothing.answers_changed_share, nothing.tokens_changed_share) == (0, 0)
    assert nothing.task_score is None


def test_rows_that_end_early_differ_in_the_positions_that_the_other_one_has():
    assert sweep.changed_share([4, 5, 6, 2], [4, 5, 2]) == 0.5
    assert sweep.changed_share([4, 2], [4, 2]) == 0
    assert sweep.changed_share([2], [3, 2]) == 1


def test_several_batches_are_pooled_by_their_queries_and_scored_one_by_one():
    model = patch_model(make_model("qwen2_vl"), steer("qwen2_vl"))
    shapes = ([[4, ("image", 2, 3), 5]], [[2, ("image", 2, 2), 3], [7, ("image", 2, 2), 9]])
    batches = [(prompt_for("qwen2_vl", rows=rows), None) for rows in shapes]
    asked = []

    def task(answers, index):
        asked.append((index, answers))
        return [float(index)] * len(answers)

    (row,) = sweep_strength(model, batches, [2.0], task=task, new_tokens=3, seed=4).rows
    parts = [attention_metrics(model, inputs) for inputs, _ in batches]  # configured with strength 2
    counts = [part.queries for part in parts]
    for name, wanted in (("kl_nats", row.attention_kl_nats), ("steered_span_mass", row.span_mass)):
        tables = [getattr(part, name) for part in parts]
        pooled = sum(table * count for table, count in zip(tables, counts, strict=True)) / sum(counts)
        assert sum(float(pooled[place]) for place in PLACES) / 6 == pytest.approx(wanted)
    entropies = [
        sum(getattr(part, name) * count for part, count in zip(parts, counts, strict=True))
        for name in ("entropy_nats", "steered_entropy_nats")
    ]
    percent = 100 * (1 - entropies[1] / entropies[0])
    assert sum(float(percent[place]) for place in PLACES) / 6 == pytest.approx(row.entropy_reduction_percent, rel=1e-4)
    tokens = [say(model, inputs, None)[:, :3].tolist() for inputs, _ in batches]
    assert asked == [(0, tokens[0]), (1, tokens[1])]
    assert row.task_score == pytest.approx(2 / 3)
    drawn = np.random.default_rng(4).choice([0.0, 1.0, 1.0], (sweep.RESAMPLES, 3)).mean(1)
    assert (row.task_low, row.task_high) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))))
    assert row.task_low < row.task_score < row.task_high or row.task_high == 1.0


def test_texts_are_handed_to_the_task_where_they_can_be_decoded():
    inputs, model = prompt_for("qwen2"), patch_model(make_model("qwen2"), steer("qwen2"))
    heard = []

    def task(answers, index):
        heard.extend(answers)
        return [len(answer) for answer in answers]

    decode = lambda rows: ["x" * len(row) for row in rows]  # noqa: E731
    found = sweep_strength(
        model, inputs, [1.0], saliency=gaze("qwen2", inputs), span=None, task=task, decode=decode, new_tokens=2
    )
    assert heard == ["xx"] * 3
    assert (found.rows[0].task_score, found.rows[0].task_low, found.rows[0].task_high) == (2, 2, 2)
    with pytest.raises(ConfigError, match="gave 1 scores for batch 0, which has 3 rows"):
        sweep_strength(model, inputs, [1.0], saliency=gaze("qwen2", inputs), span=None, task=lambda *_: [1.0], new_tokens=1)


def test_generated_queries_are_measured_where_they_are_steered():
    inputs, model = prompt_for("qwen2_vl", padding="right"), make_model("qwen2_vl")
    patch_model(model, steer("qwen2_vl", queries="generated", heads={2: "all"}))
    (row,) = sweep_strength(model, inputs, [2.0], new_tokens=1).rows
    last = torch.zeros_like(inputs["input_ids"]).bool()
    last[torch.arange(3), inputs["attention_mask"].sum(1) - 1] = True
    assert row.attention_kl_nats == pytest.approx(attention_metrics(model, inputs, queries=last).kl_nats[2].mean().item())
    assert row.attention_kl_nats > 10 * attention_metrics(model, inputs).kl_nats[2].mean().item()


@pytest.fixture
def case(tmp_path):
    inputs, model = prompt_for("qwen2"), patch_model(make_model("qwen2"), steer("qwen2"))
    return model, inputs, {"saliency": gaze("qwen2", inputs), "span": None, "new_tokens": 2, "path": tmp_path / "sweep.csv"}


def numbers_of(found):
    return [{name: value for name, value in row.flat().items() if name != "date"} for row in found.rows]


def test_a_sweep_that_was_cut_short_goes_on_where_it_was(case):
    model, inputs, kwargs = case
    asked = []

    def task(answers, index):
        asked.append(index)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [float(sum(answer)) for answer in answers]

    def steady(answers, index):
        return [float(sum(answer)) for answer in answers]

    whole = sweep_strength(model, inputs, (0, 1, 4), task=steady, **{**kwargs, "path": None})
    with pytest.raises(KeyboardInterrupt):
        sweep_strength(model, inputs, (0, 1, 4), task=task, **kwargs)
    table = list(csv.DictReader(io.StringIO(kwargs["path"].read_text())))
    assert [float(line["strength"]) for line in table] == [0, 1]
    again = sweep_strength(model, inputs, (0, 1, 4), task=task, **kwargs)
    assert len(asked) == 4  # only the last one was measured
    assert numbers_of(again) == numbers_of(whole)
    assert again.to_csv() == kwargs["path"].read_text()
    backwards = sweep_strength(model, inputs, (4, 0), task=task, **kwargs)
    assert [row.strength for row in backwards.rows] == [4, 0]
    assert len(asked) == 4
    assert not list(kwargs["path"].parent.glob(".*"))  # no temporary file is left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new_tokens": 3}, "inputs_hash '[0-9a-f]{16}', now '[0-9a-f]{16}'"),
        ({"saliency": Saliency.from_tokens(torch.ones(3, 24).cumsum(1))}, "inputs_hash"),
        ({"seed": 1}, "another sweep, with seed 0, now 1.*move the file away"),
        ({"task": lambda rows, _: [0.0] * len(rows)}, "task 'none', now 'scored'"),
    ],
)
def test_the_table_of_another_sweep_is_refused(case, change, message):
    model, inputs, kwargs = case
    sweep_strength(model, inputs, [1.0], **kwargs)
    before = kwargs["path"].read_text()
    with pytest.raises(FileError, match=message):
        sweep_strength(model, inputs, [1.0, 2.0], **{**kwargs, **change})
    assert kwargs["path"].read_text() == before


def test_another_configuration_or_prompt_is_another_sweep(case):
    model, inputs, kwargs = case
    sweep_strength(model, inputs, [1.0], **kwargs)
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    with pytest.raises(FileError, match="inputs_hash"):
        sweep_strength(model, other, [1.0], **kwargs)
    patch_model(unpatch_model(model), steer("qwen2", heads={1: (0,)}))
    with pytest.raises(FileError, match="config_hash"):
        sweep_strength(model, inputs, [1.0], **kwargs)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "strength\nx\n"])
def test_files_that_are_no_sweep_are_refused_or_empty(case, content):
    model, inputs, kwargs = case
    kwargs["path"].write_text(content)
    if content:
        with pytest.raises(FileError, match=r"sweep\.csv is not the table of a sweep.*move it away"):
            sweep_strength(model, inputs, [1.0], **kwargs)
    else:
        assert len(sweep_strength(model, inputs, [1.0], **kwargs).rows) == 1
    table = sweep_strength(model, inputs, [1.0], **{**kwargs, "path": kwargs["path"].with_name("other.csv")}).to_csv()
    cut = kwargs["path"].with_name("cut.csv")
    cut.write_text(table[: -len(table.splitlines()[1]) // 2])
    with pytest.raises(FileError, match="not the table of a sweep"):
        sweep_strength(model, inputs, [1.0], **{**kwargs, "path": cut})


def test_the_table_says_where_it_comes_from(case):
    import transformers

    import hf_steer

    model, inputs, kwargs = case
    (line,) = csv.DictReader(io.StringIO(sweep_strength(model, inputs, [1.0], **kwargs).to_csv()))
    assert "provenance" not in line
    assert line["hf_steer"] == hf_steer.__version__
    assert line["torch"] == torch.__version__
    assert line["transformers"] == transformers.__version__
    assert line["model_type"] == "qwen2"
    assert line["seed"] == "0"
    assert line["date"].endswith("+00:00")
    printed = str(sweep_strength(model, inputs, [1.0], **kwargs)).splitlines()
    assert len(printed) == 2
    assert printed[0].split()[0] == "λ"
    assert "task" not in printed[0]


def test_content_is_hashed_by_what_it_holds():
    box = Saliency.from_boxes((0, 0, 5, 5), (10, 10))
    values = [1, "1", 1.5, None, [1], [[1]], {"a": 1}, torch.tensor([1]), torch.tensor([1.0]), torch.tensor([[1]]),
              torch.tensor([1], dtype=torch.bfloat16), np.array([1]), box, Saliency.from_boxes((0, 0, 5, 6), (10, 10)),
              Saliency.from_points((1, 1), (10, 10)), Saliency.from_mask(torch.ones(2, 2)), ["a", "b"], ["ab"]]  # fmt: skip
    hashes = [content_hash(value) for value in values]
    assert len(set(hashes)) == len(values)
    assert content_hash(Saliency.from_boxes((0, 0, 5, 5), (10, 10))) == content_hash(box)
    assert content_hash({"a": 1, "b": torch.ones(2)}) == content_hash({"b": torch.ones(2), "a": 1})
    assert content_hash(torch.ones(4, 2).T) == content_hash(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("strengths", "kwargs", "error", "message"),
    [
        ((), {}, ConfigError, "there is no strength to measure"),
        ((1.0, float("nan")), {}, ConfigError, "a strength of a sweep must be a finite number; got nan"),
        ((1.0,), {"new_tokens": 0}, ConfigError, "new_tokens must be a whole number"),
        ((1.0,), {"span": "image"}, SaliencyError, "have no such tokens; they have only text"),
        ((1.0,), {"span": [torch.ones(3, 24).bool()] * 2}, ConfigError, "span has 2 tensors for 1 batches"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(case, strengths, kwargs, error, message):
    model, inputs, usual = case
    with pytest.raises(error, match=message):
        sweep_strength(model, inputs, strengths, **{**usual, **kwargs})
    assert not usual["path"].exists()


def test_models_and_prompts_that_there_is_nothing_to_sweep_are_refused(case):
    model, inputs, kwargs = case
    with pytest.raises(ConfigError, match="no prompts to measure on"):
        sweep_strength(model, [], [1.0])
    unpatch_model(model)
    with pytest.raises(PatchError, match="is not patched"):
        sweep_strength(model, inputs, [1.0], **kwargs)
    patch_model(model, steer("qwen2", strength=0.0))
    with pytest.raises(PatchError, match="steers no head"):
        sweep_strength(model, inputs, [1.0], **kwargs)


@pytest.mark.parametrize("scored", [False, True])
def test_the_picture_has_curves(case, scored, tmp_path):
    model, inputs, kwargs = case
    (row,) = sweep_strength(model, inputs, [1.0], **kwargs).rows
    more = dataclasses.replace(row, strength=3.0, kl_nats=2.0, span_mass=0.4, unsteered_span_mass=0.2)
    if scored:
        more = dataclasses.replace(more, task_score=0.5, task_low=0.4, task_high=0.6)
    path = plot_sweep(sweep.Sweep((more, row)), tmp_path / "pictures" / "sweep.png")
    assert np.asarray(Image.open(path).convert("L")).std() > 5


def run(capsys, *arguments, status=0):
    assert main([*map(str, arguments), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_the_command_sweeps_the_embedded_model(tmp_path, capsys):
    heads = tmp_path / "heads.json"
    heads.write_text('{"heads": {"2": [0, 1, 2, 3, 4, 5], "3": "all"}}')
    found = run(capsys, "sweep", "--scenes", 12, "--strengths", "0,10", "--heads", heads, "--output", tmp_path)
    nothing, steered = found["rows"]
    assert nothing["kl_nats"] == nothing["answers_changed_share"] == 0
    assert nothing["task_score"] <= 0.5
    assert steered["task_score"] >= nothing["task_score"] + 0.3
    assert steered["prompts"] == 12
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    again = run(capsys, "sweep", "--scenes", 12, "--strengths", "0,10", "--heads", heads, "--output", tmp_path)
    assert again["rows"] == found["rows"]  # read back, dates and all
    error = run(capsys, "sweep", "--scenes", 11, "--strengths", "0,10", "--heads", heads, "--output", tmp_path, status=1)
    assert error["kind"] == "FileError"


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for number, scene in enumerate(sample_scenes(load_digits("held-out"), 2, seed=3)):
        paths.append(tmp_path / f"scene{number}.png")
        scene.image.save(paths[-1])
    return ["--image", paths[0], "--image", paths[1], "--prompt", "Which digit is it?", "--output", tmp_path]


def test_the_command_sweeps_the_users_own_pictures(pictures, tmp_path, capsys):
    own = run(capsys, "sweep", *pictures, "--model", embedded_model_dir(), "--strengths", "2", "--new-tokens", 8)["rows"][0]
    assert own["prompts"] == 2
    assert own["attention_kl_nats"] > 0.01
    assert own["task_score"] is None
    pictures[-1] = tmp_path / "box"
    boxed = run(capsys, "sweep", *pictures, "--box", "0,0,28,28", "--strengths", "2", "--new-tokens", 8)["rows"][0]
    assert boxed["attention_kl_nats"] != own["attention_kl_nats"]
    assert main(["sweep", *map(str, pictures), "--box", "0,0,28,28", "--strengths", "2", "--new-tokens", "8"]) == 0
    printed = capsys.readouterr().out
    for text in ("2 pictures", "the box 0, 0, 28, 28", "answers changed", "sweep.csv"):
        assert text in printed


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--model", "x"], "ConfigError", "--model needs --image"),
        (["--image", "x.png"], "ConfigError", "--image needs --prompt"),
        (["--device", "abacus"], "ConfigError", "--device must be one that torch can use here, such as cpu or cuda; got 'abacus'"),
        (["--image", "x.png", "--prompt", "?"], "FileError", "cannot be read as a picture"),
        (["--heads", "nowhere.json"], "FileError", "--heads must be"),
        (["--heads", '{"1": [0'], "FileError", "--heads must be"),
        (["--heads", '{"one": [0]}'], "ConfigError", "keys must be layer or head numbers"),
        (["--heads", '{"9": [0]}'], "ConfigError", "layer 9 is not there"),
    ],
)
@pytest.mark.parametrize("command", [["sweep"], ["calibrate", "--budget", "1"]])
def test_arguments_that_do_not_go_together_are_refused(command, arguments, kind, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = run(capsys, *command, *arguments, status=1)
    assert error["kind"] == kind
    assert message in error["error"]


def test_the_command_calibrates_to_a_budget(tmp_path, capsys):
    found = run(capsys, "calibrate", "--budget", 0.05, "--scenes", 6, "--output", tmp_path)
    assert 0 < found["kl_nats"] <= 0.05
    assert 1 < found["strength"] < 64
    assert found["heads"] == {str(layer): list(range(6)) for layer in range(4)}
    calibrated = tmp_path / "calibration.json"
    swept = run(
        capsys, "sweep", "--scenes", 6, "--strengths", found["strength"], "--heads", calibrated, "--output", tmp_path
    )
    assert swept["rows"][0]["kl_nats"] == pytest.approx(found["kl_nats"])
    assert main(["calibrate", "--budget", "0.05", "--scenes", "4", "--largest", "1", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "λ = 1 keeps the budget" in printed
    assert "ended at the largest strength that was allowed" in printed


def test_the_command_calibrates_heads_and_shares(pictures, tmp_path, capsys):
    heads = ["--heads", '{"1": [0], "3": [2, 4]}', "--output", tmp_path]
    found = run(capsys, "calibrate", "--budget", 0.02, "--per-head", "--scenes", 3, *heads)
    assert {layer: sorted(own) for layer, own in found["strength"].items()} == {"1": ["0"], "3": ["2", "4"]}
    assert found["kl_nats"] <= 0.02
    cell = run(capsys, "calibrate", "--target-mass", 0.5, "--scenes", 3, "--heads", '{"1": [0]}', "--output", tmp_path)
    assert cell["unsteered_mass"]["1"]["0"] < 0.4 < cell["steered_mass"]["1"]["0"] < 0.6
    for box in ([], ["--box", "0,0,20,20"]):  # most of the cell's token, and so all of it
        share = run(capsys, "calibrate", "--target-mass", 0.5, *pictures, *box, "--heads", '{"1": [0]}')
        assert 0.4 < share["steered_mass"]["1"]["0"] < 0.6
    assert main(["calibrate", "--target-mass", "0.5", *map(str, pictures), *map(str, heads)]) == 0
    assert "steered share" in capsys.readouterr().out
    assert main(["calibrate", "--budget", "0.02", "--per-head", "--scenes", "2", *map(str, heads)]) == 0
    assert "keep the budget together" in capsys.readouterr().out
