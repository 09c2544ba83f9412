"""What a search for heads is asked: examples and settings that do not fit, files, the command and its picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from kit import tiny_encoders
from kit.grounding import every, make_example, make_examples
from kit.tiny import IMAGE, make_model, make_prompt, pad_rows
from transformers import AutoProcessor

from hf_steer import (
    AttentionConfig,
    ConfigError,
    GateConfig,
    PatchError,
    Saliency,
    SaliencyConfig,
    SaliencyError,
    SteerConfig,
    get_steer_status,
    patch_model,
)
from hf_steer.analysis import HeadExample, HeadResult, find_grounding_heads
from hf_steer.analysis.heads import RULES
from hf_steer.analysis.heads import find as finding
from hf_steer.analysis.heads.jsonl import read_jsonl
from hf_steer.cli import heads as heads_command
from hf_steer.cli import main
from hf_steer.embedded import embedded_model_dir
from hf_steer.evidence import digits
from hf_steer.patching import anatomy_of


def state_of(model, example):
    with torch.no_grad():
        logits = model(**example.inputs).logits
    return logits, [site.module.config for site in anatomy_of(model).layers], dict(vars(model)), list(model.state_dict())


@every
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was_also_when_the_search_is_interrupted(family, implementation, fails, monkeypatch):
    model = tiny_encoders.make_encoder_model(family, implementation=implementation)
    examples = make_examples(family, 40)
    before = state_of(model, examples[0])
    if fails:

        def interrupt(*args, **kwargs):
            assert get_steer_status(model).patched
            raise KeyboardInterrupt

        monkeypatch.setattr(finding, "make_report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            find_grounding_heads(model, examples, rule="mass", null_sets=2)
    else:
        find_grounding_heads(model, examples, rule="mass", null_sets=2)
    after = state_of(model, examples[0])
    assert torch.equal(before[0], after[0])
    assert all(old is new for old, new in zip(before[1], after[1], strict=True))
    assert before[2:] == after[2:]


def with_inputs(example, **changes):
    return HeadExample({**example.inputs, **changes}, example.span, example.answer, example.query)


def with_span(example, span):
    return HeadExample(example.inputs, span, example.answer, example.query)


def text_span(example):
    span = torch.zeros_like(example.span)
    span[0] = True
    return span


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda e: with_span(e, torch.zeros_like(e.span)), SaliencyError, "example 7: its span marks 0 tokens"),
        (lambda e: with_span(e, text_span(e)), SaliencyError, "example 7: its span marks 1 tokens, 1 of them outside the 12"),
        (lambda e: with_span(e, e.inputs["input_ids"][0] == IMAGE), SaliencyError, "marks 12 tokens.*some of these and not all"),
        (lambda e: with_span(e, torch.ones(99, dtype=torch.bool)), SaliencyError, "covers 99 tokens; the prompt has"),
        (lambda e: with_span(e, e.span.float()), SaliencyError, "a span is a bool tensor"),
        (lambda e: with_span(e, Saliency.from_boxes((0, 0, 5, 5), (10, 10), row=1)), SaliencyError, "no image 0 in row 1"),
        (lambda e: with_inputs(e, input_ids=e.inputs["input_ids"].clamp(max=80)), SaliencyError, "example 7: image token count"),
        (
            lambda e: HeadExample(make_prompt("qwen2_vl", [[9]]), torch.ones(9, dtype=torch.bool), 5), SaliencyError,
            "example 7: its span marks 9 tokens, 1 of them outside the 8 tokens of its text after the first",
        ),
        (lambda e: HeadExample(e.inputs, e.span, 5, among=e.span), SaliencyError, "of them outside the . tokens of among"),
        (lambda e: HeadExample(e.inputs, e.span, 5, among=e.span.float()), SaliencyError, "among is a bool tensor over"),
        (lambda e: with_inputs(e, input_ids=e.inputs["input_ids"].repeat(2, 1)), ConfigError, r"one row.*shape \(2, "),
        (lambda e: with_inputs(e, pixel_values=[1.0]), ConfigError, r"\['pixel_values'\] are not tensors"),
        (lambda e: HeadExample({}, e.span, 5), ConfigError, "no input_ids"),
        (lambda e: HeadExample(e.inputs, e.span, 96), ConfigError, "answer=96 is not a token id; the vocabulary has 96, 0 to 95"),
        (lambda e: HeadExample(e.inputs, e.span, -1), ConfigError, "answer=-1 is not a token id"),
        (lambda e: HeadExample(e.inputs, e.span, None), ConfigError, "39 of 40 examples have an answer"),
        (lambda e: HeadExample(e.inputs, e.span, 5, query=99), ConfigError, "query=99 is not one of the prompt's"),
        (lambda e: HeadExample(e.inputs, e.span, 5, query=2), ConfigError, "query=2 comes before the last vision or audio token"),
        (lambda e: dict(e.inputs), ConfigError, "HeadExample objects; got dict"),
    ],
)  # fmt: skip
def test_examples_that_do_not_fit_are_named_and_the_model_is_not_touched(change, error, message):
    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 40)
    examples[7] = change(examples[7])
    with pytest.raises(error, match=message):
        find_grounding_heads(model, examples)
    assert not get_steer_status(model).patched


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"count": 13}, r"count=13 is more heads than.*the model has 12, 4 in each of 3 layers"),
        ({"count": 0}, "count must be a whole number of at least 1"),
        ({"count": 4, "shortlist": 3}, "count=4 is more heads than.*shortlist=3"),
        ({"count": 4, "candidates": 3}, "count=4 is more heads than.*candidates=3"),
        ({"rule": "best"}, "rule must be one of 'forward', 'mass'"),
        ({"strength": 0.0}, "strength must not be 0"),
        ({"strength": float("nan")}, "strength must be a finite number"),
        ({"report_fraction": 1.0}, "report_fraction must lie between 0 and 1"),
        ({"report_fraction": 0.1}, "too few examples: 36 to choose with, 4 to report on; it takes at least 20 of each"),
        ({"null_sets": 0}, "null_sets must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"report": []}, "too few examples: 40 to choose with, 0"),
        ({"saliency": SaliencyConfig()}, "with source=None"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kwargs, message):
    model = make_model("qwen2_vl")
    with pytest.raises(ConfigError, match=message):
        find_grounding_heads(model, make_examples("qwen2_vl", 40), **kwargs)
    assert not get_steer_status(model).patched


def test_calls_that_cannot_be_answered_say_why():
    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 40)
    with pytest.raises(ConfigError, match="there are no examples"):
        find_grounding_heads(model, [])
    with pytest.raises(ConfigError, match="both examples and report"):
        find_grounding_heads(model, examples, report=examples[:20])
    with pytest.raises(ConfigError, match="rule 'effect' needs examples with answers"):
        find_grounding_heads(model, make_examples("qwen2_vl", 40, answer=False), rule="effect")
    with pytest.raises(PatchError, match="'llama' has no heads that look at what an encoder hands on"):
        text = pad_rows([[5, 6, 7]], padding="left")
        find_grounding_heads(make_model("llama"), [HeadExample(text, torch.ones(3).bool())] * 40, attends="cross")
    onevision = tiny_encoders.make_encoder_model("llava_onevision")
    with pytest.raises(ConfigError, match="the token grid of 'llava_onevision' is not known"):
        find_grounding_heads(onevision, make_examples("llava_onevision", 40), rule="localisation")
    boxed = with_span(make_example("llava_onevision", 0), Saliency.from_boxes((5, 5, 6, 6), (12, 12)))
    with pytest.raises(SaliencyError, match="example 0: image 0 in row 0 was said to have 12 x 12 pixels"):
        find_grounding_heads(onevision, [boxed] * 40)
    with pytest.raises(PatchError, match="training mode"):
        find_grounding_heads(model.train(), examples)


@pytest.mark.parametrize(
    "attention",
    [
        None,
        AttentionConfig(heads={1: "all"}, saliency=SaliencyConfig(source=None), queries="all"),
        AttentionConfig(heads="all", saliency=SaliencyConfig(source=None)),
        AttentionConfig(heads="all", saliency=SaliencyConfig(source="vision_attention")),
        AttentionConfig(heads="all", strength=0.0, saliency=SaliencyConfig(source=None)),
        AttentionConfig(heads="all", queries="generated", saliency=SaliencyConfig(source=None)),
        AttentionConfig(heads="all", gate=GateConfig(), saliency=SaliencyConfig(source=None)),
    ],
)
def test_a_model_that_is_patched_otherwise_is_refused_and_stays_so(attention):
    model = make_model("qwen2_vl")
    patch_model(model, SteerConfig(attention=attention))
    status = get_steer_status(model)
    with pytest.raises(PatchError, match="not so that all its 3 layers are always steered"):
        find_grounding_heads(model, make_examples("qwen2_vl", 40))
    assert get_steer_status(model) == status


def test_the_picture_shows_every_score_and_the_random_sets(tmp_path):
    from PIL import Image

    from hf_steer.analysis.plots import plot_heads

    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 40)
    for name, kwargs in (("short", {"count": 2, "shortlist": 3}), ("whole", {"count": 12})):  # heads not tried; no random sets
        result = find_grounding_heads(model, examples, null_sets=3, **kwargs)
        picture = np.asarray(Image.open(plot_heads(result, tmp_path / f"{name}.png")).convert("L"))
        assert picture.std() > 5
        assert picture.shape[0] > 800
    assert "no others to compare them with" in result.verdict


def test_the_command_writes_the_result_as_json_csv_and_picture(tmp_path, capsys):
    arguments = ["heads", "--scenes", "20", "--rule", "mass", "--count", "2", "--null-sets", "3", "--output", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    result = HeadResult.from_json((tmp_path / "heads.json").read_text())
    assert AttentionConfig(heads=printed["heads"]) == AttentionConfig(heads=result.heads)
    assert result.report.measure == "answers"
    assert printed["files"] == [str(tmp_path / name) for name in ("heads.json", "heads.csv", "heads.png")]
    assert (tmp_path / "heads.csv").read_text() == result.to_csv()
    assert (tmp_path / "heads.png").stat().st_size > 10_000
    assert main(arguments) == 0
    assert "random heads, as many in the same layers (3 sets)" in capsys.readouterr().out


def test_the_command_asks_for_the_place_when_the_rule_is_to_point(tmp_path, capsys):
    arguments = ["heads", "--json", "--scenes", "25", "--rule", "pointing", "--count", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"]["measure"] == "pointing"
    assert printed["verdict"] == "found"


def test_the_help_says_which_rule_to_use_when(capsys):
    with pytest.raises(SystemExit):
        main(["heads", "--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {rule} " in printed for rule in RULES)
    assert set(heads_command.RULES) == set(RULES)


def write_lines(folder, count, **changes):
    scenes = digits.sample_scenes(digits.load_digits("training"), count, seed=0)
    lines = []
    for number, scene in enumerate(scenes):
        scene.image.save(folder / f"{number}.png")
        line = {"image": f"{number}.png", "question": "Read the digit.", "box": scene.boxes[1], "answer": str(scene.labels[1])}
        lines.append({**line, "thought": "I look at the picture and read what I see.\n</think>\n\n"})
    lines[0].update(changes)
    path = folder / "examples.jsonl"
    path.write_text("\n".join(json.dumps({key: value for key, value in line.items() if value is not None}) for line in lines))
    return path, scenes


def test_examples_come_from_a_file_through_the_processor(tmp_path, capsys):
    path, scenes = write_lines(tmp_path, 40)
    processor = AutoProcessor.from_pretrained(embedded_model_dir())
    for example, scene in zip(read_jsonl(path, processor), scenes, strict=True):
        text = processor.tokenizer.decode(example.inputs["input_ids"][0])
        assert "Read the digit." in text
        assert text.endswith("what I see.\n</think>\n\n")
        assert processor.tokenizer.decode([example.answer]) == str(scene.labels[1])
        assert example.span.regions[0].paint.on_grid(2, 2).tolist() == [[0, 1], [0, 0]]
    arguments = ["heads", "--json", "--examples-file", str(path), "--rule", "mass", "--null-sets", "2"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["examples"] == 20


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"image": "nowhere.png"}, "FileError", "nowhere.png' cannot be read as a picture"),
        ({"image": "examples.jsonl"}, "FileError", "examples.jsonl' cannot be read as a picture"),
        ({"box": [0, 0, 99, 9]}, "SaliencyError", "line 1: box (0.0, 0.0, 99.0, 9.0) is empty or outside"),
        ({"box": None}, "FileError", "line 1: a line is an object with image, question, box"),
        ({"boxes": [1]}, "FileError", "line 1: a line is an object with"),
        ({"question": 7}, "FileError", "line 1: question must be text"),
        ({"answer": ""}, "FileError", "answer must be text, and not empty"),
    ],
)
def test_lines_that_are_no_examples_are_named(changes, kind, message, tmp_path, capsys):
    path, _ = write_lines(tmp_path, 2, **changes)
    assert main(["heads", "--json", "--examples-file", str(path)]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["kind"] == kind
    assert message in printed["error"]


def test_files_that_hold_no_json_are_refused(tmp_path, capsys):
    path = tmp_path / "examples.jsonl"
    for content, message in ((b"{", "line 1: not JSON"), (b"[1]", "line 1: a line is"), (b"\xff\xfe", "cannot be read")):
        path.write_bytes(content)
        assert main(["heads", "--examples-file", str(path)]) == 1
        assert message in capsys.readouterr().err
    assert main(["heads", "--examples-file", str(tmp_path / "nowhere")]) == 1
    assert main(["heads", "--model", str(embedded_model_dir())]) == 1
    assert "--model needs --examples-file" in capsys.readouterr().err
