"""Pixels, fractions and thousandths: the same place in each, and an error where the unit cannot be the one that was meant."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from hf_steer import Saliency, SaliencyError
from hf_steer.analysis.heads.jsonl import read_jsonl
from hf_steer.cli import main
from hf_steer.embedded import embedded_model_dir

SIZE = (84, 56)
ALL_THREE = 'unit="pixels".*"fraction".*"thousandths"'
SIDES = {"pixels": SIZE, "fraction": (1, 1), "thousandths": (1000, 1000)}


def counted(numbers, unit):
    """Pixels of the picture, x and y by turns, in a unit; in plain arithmetic."""
    return tuple(number / SIZE[place % 2] * SIDES[unit][place % 2] for place, number in enumerate(numbers))


def grid_of(statement):
    (region,) = statement.regions
    assert region.size == SIZE  # whatever the unit: the model's inputs are held against it
    return region.paint.on_grid(4, 6)


@pytest.mark.parametrize("unit", SIDES)
@pytest.mark.parametrize("size", [SIZE, Image.new("RGB", SIZE)], ids=["numbers", "picture"])
def test_a_box_lies_in_the_same_place_in_every_unit(unit, size):
    """Tokens are 14 pixels a side; the shares are worked out by hand."""
    grid = grid_of(Saliency.from_boxes(counted((7, 14, 35, 49), unit), size, unit=unit))
    expected = torch.zeros(4, 6)
    expected[1:3, 0], expected[1:3, 1], expected[1:3, 2] = 0.5, 1.0, 0.5
    expected[3, :3] = torch.tensor([0.25, 0.5, 0.25])
    torch.testing.assert_close(grid, expected)


@pytest.mark.parametrize("unit", SIDES)
def test_points_lie_in_the_same_place_in_every_unit_and_their_radius_stays_in_pixels(unit):
    points = [(10, 50), (70, 7)]
    expected = grid_of(Saliency.from_points(points, SIZE, radius_px=9))
    said = Saliency.from_points([counted(point, unit) for point in points], SIZE, radius_px=9, unit=unit)
    torch.testing.assert_close(grid_of(said), expected)
    default = Saliency.from_points([counted(point, unit) for point in points], SIZE, unit=unit)
    torch.testing.assert_close(grid_of(default), grid_of(Saliency.from_points(points, SIZE)))


def test_pixels_are_what_is_meant_where_nothing_is_said():
    box, point = (7, 14, 35, 49), (10, 50)
    assert torch.equal(grid_of(Saliency.from_boxes(box, SIZE)), grid_of(Saliency.from_boxes(box, SIZE, unit="pixels")))
    assert torch.equal(grid_of(Saliency.from_points(point, SIZE)), grid_of(Saliency.from_points(point, SIZE, unit="pixels")))


FRACTIONS = [(0.1, 0.2, 0.6, 0.9), (0.0, 0.0, 0.5, 1.0), (3, 5, 3.5, 40), (3, 5, 40, 5.99)]


@pytest.mark.parametrize("box", FRACTIONS)
def test_a_box_below_one_pixel_is_refused_with_all_three_units(box):
    """Whole pixels beside it do not excuse it."""
    with pytest.raises(SaliencyError, match=rf"box \({float(box[0])}, .*less than one.*{ALL_THREE}"):
        Saliency.from_boxes([(0, 0, 40, 40), box], SIZE)


def test_a_box_of_one_pixel_is_one_even_in_half_precision():
    grid = grid_of(Saliency.from_boxes((0, 0, 1, 1), SIZE))
    assert grid[0, 0].item() == pytest.approx(1 / 196)
    Saliency.from_boxes(torch.tensor([3.0, 4.0, 4.0, 9.0], dtype=torch.bfloat16), SIZE)


@pytest.mark.parametrize(("points", "refused"), [
    ((0.4, 0.7), True), ([(0.4, 0.7), (1, 0)], True), ((0, 0), False), ((1, 1), False), ([(0.4, 0.7), (30, 20)], False),
])  # fmt: skip
def test_points_that_all_lie_within_the_first_pixel_are_refused(points, refused):
    if refused:
        with pytest.raises(SaliencyError, match=f"within the first pixel, which cannot be told from fractions.*{ALL_THREE}"):
            Saliency.from_points(points, SIZE)
    else:
        Saliency.from_points(points, SIZE)


OUTSIDE = [
    ((10, 10, 40, 40), "fraction", "0 to 1 in unit='fraction'.*It would fit with unit='pixels' or 'thousandths'"),
    ((100, 200, 900, 800), "fraction", "It would fit with unit='thousandths'"),
    ((100, 200, 900, 800), "pixels", "84 x 56 pixels.*It would fit with unit='thousandths'"),
    ((0, 0, 84, 60), "pixels", "It would fit with unit='thousandths'"),
]


@pytest.mark.parametrize(("box", "unit", "message"), OUTSIDE)
def test_a_box_outside_says_which_unit_would_fit(box, unit, message):
    with pytest.raises(SaliencyError, match=f"outside the picture.*{message}"):
        Saliency.from_boxes(box, SIZE, unit=unit)
    with pytest.raises(SaliencyError, match=f"point.* is outside the picture.*{message}"):
        Saliency.from_points(box[2:], SIZE, unit=unit)


def test_thousandths_above_1000_fit_a_large_picture_in_pixels():
    with pytest.raises(SaliencyError, match="0 to 1000 in unit='thousandths'.*It would fit with unit='pixels'"):
        Saliency.from_boxes((100, 200, 1900, 800), (2000, 1200), unit="thousandths")


@pytest.mark.parametrize("unit", SIDES)
@pytest.mark.parametrize("box", [(-1, 0, 5, 10), (40, 0, 30, 10), (5, 0, 5, 10), (3000, 0, 4000, 10)])
def test_what_fits_no_unit_promises_none(box, unit):
    with pytest.raises(SaliencyError, match="is empty or outside") as caught:
        Saliency.from_boxes(box, SIZE, unit=unit)
    assert "would fit" not in str(caught.value)


@pytest.mark.parametrize("unit", ["percent", "", None, 1000, ["pixels"]])
def test_another_unit_is_refused_with_the_three(unit):
    for build in (Saliency.from_boxes, Saliency.from_points):
        with pytest.raises(SaliencyError, match=f"is none; give {ALL_THREE}"):
            build((1, 1, 2, 2), SIZE, unit=unit)


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "scene.png"
    Image.effect_noise((112, 56), 80).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("unit", [None, "pixels", "fraction", "thousandths"])
def test_a_line_of_examples_says_its_unit(scene, unit):
    from transformers import AutoProcessor

    box = {"fraction": [0.25, 0, 0.75, 0.5], "thousandths": [250, 0, 750, 500]}.get(unit, [28, 0, 84, 28])
    line = {"image": scene.name, "question": "Which?", "box": box, **({"unit": unit} if unit else {})}
    file = scene.with_name("examples.jsonl")
    file.write_text(json.dumps(line) + "\n")
    (example,) = read_jsonl(file, AutoProcessor.from_pretrained(embedded_model_dir()))
    (region,) = example.span.regions
    assert region.paint.fractions == ((0.25, 0.0, 0.75, 0.5),)


def test_a_line_with_another_unit_is_refused_with_its_number(scene):
    file = scene.with_name("examples.jsonl")
    file.write_text(json.dumps({"image": scene.name, "question": "Which?", "box": [0, 0, 9, 9], "unit": "percent"}))
    from transformers import AutoProcessor

    with pytest.raises(SaliencyError, match=f"line 1: unit='percent' is none; give {ALL_THREE}"):
        read_jsonl(file, AutoProcessor.from_pretrained(embedded_model_dir()))


def test_the_command_line_takes_a_unit(scene, tmp_path, capsys):
    """The same place in two units gives the same table; fractions without the word are refused."""
    command = ["sweep", "--image", str(scene), "--prompt", "Which digit?", "--strengths", "0,2", "--new-tokens", "2", "--json"]
    reports = []
    for name, box in (("pixels", "28,0,84,28"), ("fraction", "0.25,0,0.75,0.5")):
        assert main([*command, "--box", box, "--unit", name, "--output", str(tmp_path / name)]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    names = ("span_mass", "kl_nats", "entropy_reduction_percent")
    measured = [[[row[name] for name in names] for row in own["rows"]] for own in reports]
    assert measured[0] == measured[1]
    assert measured[0][0] != measured[0][1]
    assert main([*command, "--box", "0.25,0,0.75,0.5", "--output", str(tmp_path / "none")]) != 0
    assert '"fraction" (0 to 1 of its sides)' in json.loads(capsys.readouterr().out)["error"]
    assert main(["sweep", "--unit", "fraction", "--strengths", "0", "--output", str(tmp_path / "alone")]) != 0
    assert "--unit needs --image" in capsys.readouterr().err
