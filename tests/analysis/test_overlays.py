"""`hf-steer saliency`: a map per source, on the embedded model and on another family."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_steer.analysis.plots import overlay_map, plot_trace
from hf_steer.cli import main
from hf_steer.embedded import embedded_model_dir
from hf_steer.errors import SteerError
from hf_steer.evidence import digits
from hf_steer.patching import TraceStep
from hf_steer.registry import SOURCES


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    digits.sample_scenes(digits.load_digits("held-out"), 1, seed=3)[0].image.resize((112, 112)).save(path)
    return str(path)


def test_every_source_is_drawn_and_the_maps_are_what_is_said(picture, tmp_path, capsys):
    command = ["saliency", picture, "--prompt", "Which digit is at the top left?", "--provider", str(embedded_model_dir())]
    assert main([*command, "--output", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["maps"]) == {*SOURCES, "external"}
    for name, rows in report["maps"].items():
        own = np.array(rows)
        assert own.shape == (4, 4), name
        assert own.std() > 0, name
        x, y = report["peaks"][name]
        assert own[int(y // 28), int(x // 28)] == own.max()
    assert report["maps"]["external"] == report["maps"]["vision_attention"]  # the provider is the same model
    assert json.loads((tmp_path / "saliency.json").read_text())["peaks"] == report["peaks"]
    assert np.asarray(Image.open(tmp_path / "saliency.png").convert("L")).std() > 5


def test_the_table_and_the_choices_of_the_command(picture, tmp_path, capsys):
    command = ["saliency", picture, "--output", str(tmp_path), "--sources", "decoder_attention,gradient"]
    assert main([*command, "--heads", '{"1": [0, 3]}', "--answer", "7"]) == 0
    printed = capsys.readouterr().out
    assert "decoder_attention" in printed
    assert "vision_attention" not in printed
    assert str(tmp_path / "saliency.png") in printed
    assert main(["saliency", picture, "--sources", "vision_attention", "--blocks", "0,1", "--output", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sources", "eyes"], "--sources must be some of 'vision_attention'"),
        (["--sources", "vision_attention", "--blocks", "9"], r"vision blocks \[9\] are not there"),
        (["--sources", "vision_attention", "--blocks", "last"], "--blocks must be whole numbers"),
        (["--sources", "decoder_attention", "--heads", '{"9": [0]}'], "layer 9 is not there"),
        (["--answer", ""], "has no tokens"),
        (["--heads", "[1"], "--heads must be"),
    ],
)
def test_bad_input_is_refused(picture, tmp_path, capsys, arguments, message):
    import re

    assert main(["saliency", picture, "--output", str(tmp_path), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_what_is_no_picture_is_refused(tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    assert main(["saliency", str(tmp_path / "text.png")]) == 1
    assert "cannot be read as a picture" in capsys.readouterr().err


def test_overlays_are_strongest_where_the_map_is():
    white = Image.new("RGB", (40, 20), "white")
    laid = overlay_map(white, torch.tensor([[0.0, 1.0]]))
    assert laid.shape == (20, 40, 3)
    assert np.allclose(laid[:, :20], 1.0)
    assert laid[:, 20:, 1].max() < 0.7
    assert np.allclose(overlay_map(white, torch.ones(2, 2)), 1.0)  # a flat map says nothing


def test_a_trace_is_drawn_over_its_text(tmp_path):
    steps = [TraceStep(i, "thinking" if i < 30 else "answer", float(i % 2), 2.0 * (i % 2), 0.5) for i in range(50)]
    path = plot_trace(steps, ["word"] * 50, tmp_path / "trace.png")
    assert np.asarray(Image.open(path).convert("L")).std() > 5
    with pytest.raises(SteerError, match="one text per step; got 50 steps and 3 texts"):
        plot_trace(steps, ["word"] * 3, tmp_path / "trace.png")
