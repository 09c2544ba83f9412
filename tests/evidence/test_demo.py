"""The embedded model, the demo and the commands, through the public path."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import hf_steer
from hf_steer import AttentionConfig, Saliency, SaliencyConfig, SteerConfig, use_saliency
from hf_steer.cli import main
from hf_steer.evidence import digits, pointing

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "tiny_r1_vl"


def test_the_embedded_model_is_small_and_loads_with_plain_auto_classes():
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (FOLDER / "model.safetensors").stat().st_size <= 6_000_000
    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
    assert model.config.model_type == "qwen2_vl"
    processor = AutoProcessor.from_pretrained(FOLDER)
    assert processor.tokenizer.decode(processor.tokenizer("Hello, wörld! 42 猫")["input_ids"]) == "Hello, wörld! 42 猫"
    card = (FOLDER / "README.md").read_text()
    assert "license: apache-2.0" in card
    facts = json.loads((FOLDER / "training.json").read_text())
    assert facts["training_seconds"] < 600


def test_held_out_pictures_are_not_trained_on():
    training, held_out = digits.load_digits("training"), digits.load_digits("held-out")
    assert len(training.labels) + len(held_out.labels) == 1797
    seen = {picture.tobytes() for picture in training.pictures}
    assert not any(picture.tobytes() in seen for picture in held_out.pictures)
    assert set(held_out.labels) == set(range(10))


def ask(questions, scenes, **kwargs):
    model = AutoModelForImageTextToText.from_pretrained(FOLDER).eval()
    processor = AutoProcessor.from_pretrained(FOLDER)
    messages = [digits.messages_for(scene.image, question) for scene, question in zip(scenes, questions, strict=True)]
    texts = [processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in messages]
    inputs = processor(
        text=texts, images=[scene.image for scene in scenes], return_tensors="pt", padding=True, padding_side="left"
    )
    tokens = model.generate(**inputs, **{"max_new_tokens": 40, "do_sample": False, **kwargs})
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_unsteered_model_answers_closed_questions_and_spreads_over_open_ones():
    scenes = digits.sample_scenes(digits.load_digits("held-out"), 60, seed=11)
    cells = np.random.default_rng(11).integers(0, 4, len(scenes))
    closed = ask([digits.PLACE_QUESTIONS[0].format(place=digits.PLACES[2, 2][cell]) for cell in cells], scenes)
    wanted = [scene.labels[cell] for scene, cell in zip(scenes, cells, strict=True)]
    found = [pointing.ANSWER.search(text) for text in closed]
    right = [match is not None and int(match.group(1)) == label for match, label in zip(found, wanted, strict=True)]
    assert np.mean(right) > 0.85
    torch.manual_seed(0)
    drawn = ask([digits.OPEN_QUESTIONS[0]] * 200, [scenes[0]] * 200, do_sample=True)
    answers = [int(match.group(1)) for text in drawn if (match := pointing.ANSWER.search(text))]
    shares = [answers.count(label) / len(drawn) for label in scenes[0].labels]
    assert sum(shares) > 0.9
    assert min(shares) > 0.08  # every digit that is shown gets its part


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo of the command line, three seeds."""
    results = {}
    for seed in (0, 1, 2):
        folder = tmp_path_factory.mktemp(f"demo{seed}")
        command = [sys.executable, "-m", "hf_steer.cli", "demo", "--json", "--seed", str(seed), "--output", str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=folder)
        results[seed] = (folder, json.loads(run.stdout))
    return results


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_keeps_its_figures(demo, seed):
    folder, result = demo[seed]
    rows = {(row["saliency"], row["strength"]): row for row in result["rows"]}
    best = result["best_strength"]
    unsteered, steered = rows["nothing", 0.0], rows["pointed-at cell", best]
    assert unsteered["pointed_share"] <= 0.45
    assert steered["pointed_share"] >= 0.95
    assert unsteered["low"] <= rows["uniform", best]["pointed_share"] <= unsteered["high"]
    assert rows["another cell", best]["pointed_share"] <= 0.1
    assert rows["shuffled", best]["pointed_share"] <= 0.45
    assert steered["kl_nats"] > 0.3 > unsteered["kl_nats"] == 0
    for row in result["rows"]:
        assert 0 <= row["low"] <= row["pointed_share"] <= row["high"] <= 1
    with open(folder / "pointing.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["pointed_share"]) for row in table] == [row["pointed_share"] for row in result["rows"]]
    for name in ("examples.png", "strength.png"):
        assert np.asarray(Image.open(folder / name).convert("L")).std() > 5


def test_the_demo_runs_from_an_installed_wheel(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "hf_steer/tiny_r1_vl/model.safetensors" in names
    assert {"hf_steer/py.typed", "hf_steer/__init__.pyi"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "examples"))]
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = "import hf_steer, sys; print(hf_steer.__file__); from hf_steer.cli import main; sys.exit(main(['demo', '--json']))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path, timeout=300
    )
    origin, result = run.stdout.splitlines()
    assert origin.startswith(str(tmp_path / "site"))
    assert {"nothing", "pointed-at cell"} <= {row["saliency"] for row in json.loads(result)["rows"]}
    assert (tmp_path / "hf_steer_demo" / "examples.png").exists()


def test_the_demo_prints_a_table_that_explains_itself(tmp_path, capsys):
    assert main(["demo", "--scenes", "6", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("saliency on", "names the pointed-at digit", "KL (nats)", "another cell", "shuffled", "uniform", "examples.png"):
        assert text in printed


def test_the_same_seed_gives_the_same_table():
    tables = [pointing.run_pointing(scenes=6, seed=5, strengths=(1.0, 2.0)).to_csv() for _ in range(2)]
    assert tables[0] == tables[1]


def test_wilson_intervals_equal_published_values():
    # R 4.3, prop.test(x, n, correct = FALSE)$conf.int
    assert pointing.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611252), abs=1e-6)
    assert pointing.wilson_interval(39, 100) == pytest.approx((0.3001, 0.4880), abs=1e-3)


def test_answers_that_do_not_close_their_thought_or_name_two_digits_are_wrong():
    assert pointing.ANSWER.search("I look.\n</think>\n\n7").group(1) == "7"
    for text in ("777777", "I look.\n</think>\n\n7 7", "I look.\n</think>\n\n", "</think>\n\nseven"):
        assert pointing.ANSWER.search(text) is None


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llama"])
def test_inspect_finds_the_parts_without_reading_weights(family, tmp_path, capsys):
    from kit.tiny import make_model

    make_model(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["can_be_patched"]
    assert report["anatomy"]["layers"].startswith("3: ")
    assert report["anatomy"]["heads per layer"] == "4 query, 2 key/value, of 8 features"
    assert ("vision tokens" in report["anatomy"]) == (family != "llama")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "can be patched   yes" in capsys.readouterr().out


def test_inspect_says_why_a_model_cannot_be_patched(tmp_path, capsys):
    from transformers import MambaConfig

    MambaConfig(architectures=["MambaForCausalLM"], num_hidden_layers=1).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    why = "can be patched   no: a gaze cannot be put into this 'mamba' model: MambaModel has no attention"
    assert why in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "nowhere"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["kind"] == "FileError"
    assert main(["demo", "--model", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("hf-steer: ")


def test_boxes_on_a_resized_picture_point_at_the_same_place():
    """Boxes are in pixels of the original picture, whatever the processor makes of it."""
    scene = digits.sample_scenes(digits.load_digits("held-out"), 1, seed=3)[0]
    large = scene.image.resize((336, 336), Image.Resampling.BICUBIC)
    config = SteerConfig(attention=AttentionConfig(strength=8.0, saliency=SaliencyConfig(source=None, preserve_mass=True)))
    model = hf_steer.from_pretrained(FOLDER, steer_config=config).eval()
    processor = AutoProcessor.from_pretrained(FOLDER)
    text = processor.apply_chat_template(
        digits.messages_for(large, "Which digit is it?"), tokenize=False, add_generation_prompt=True
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}  # pixels, in Qwen2-VL's processor
    inputs = processor(text=[text], images=[large], return_tensors="pt", size=size)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    for label, (left, top, right, bottom) in zip(scene.labels, scene.boxes, strict=True):
        box = tuple(6 * side for side in (left, top, right, bottom))
        with use_saliency(model, Saliency.from_boxes(box, large)):
            tokens = model.generate(**inputs, do_sample=False)
        said = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert pointing.ANSWER.search(said).group(1) == str(label)


def test_char_spans_of_a_padded_batch_mark_the_words_they_name():
    """Offsets of the real tokenizer, on the text side of a model that can also see."""
    saliency = SaliencyConfig(source=None, normalize="minmax")
    config = SteerConfig(attention=AttentionConfig(queries="all", strength=2.0, saliency=saliency))
    model = hf_steer.from_pretrained(FOLDER, steer_config=config).eval()
    tokenizer = AutoProcessor.from_pretrained(FOLDER).tokenizer
    prompts = ["Which digit is at the top left?", "Read the digit."]
    inputs = tokenizer(prompts, return_offsets_mapping=True, padding=True, padding_side="left", return_tensors="pt")
    offsets = inputs.pop("offset_mapping")
    spans = [[(prompts[0].index("top"), prompts[0].index("top") + 3)], [(0, 4)]]
    saliency = Saliency.from_char_spans(spans, offsets)
    marked = [tokenizer.decode(ids[scores > 0]) for ids, scores in zip(inputs["input_ids"], saliency.tokens, strict=True)]
    assert [text.strip() for text in marked] == ["top", "Read"]
    with torch.no_grad():
        plain = model(**inputs).logits
        with use_saliency(model, saliency):
            steered = model(**inputs).logits
        with use_saliency(model, Saliency.from_tokens(saliency.tokens)):
            assert torch.equal(model(**inputs).logits, steered)
    assert (steered - plain)[inputs["attention_mask"].bool()].abs().max() > 0.05
