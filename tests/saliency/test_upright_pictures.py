"""Pictures that a camera stored on their side lie the same way for the model, the provider and the command line, or are refused."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image, ImageOps
from qwen_vl_utils import process_vision_info
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_steer import FileError, Saliency, SaliencyError, SaliencyProvider, read_saliency
from hf_steer.analysis.heads.jsonl import read_jsonl
from hf_steer.cli import main
from hf_steer.embedded import embedded_model_dir
from hf_steer.saliency import open_upright

ORIENTATION = 0x0112
STORED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels),  # to be turned clockwise
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, -1),
}
"""Orientation, as EXIF numbers it -> how a sensor held that way stored an upright picture."""
LYING = [number for number in STORED if number != 1]
WIDTH, HEIGHT = 112, 56


def upright_pixels(seed=0):
    """Wide, and alike in no two quarters."""
    pixels = np.random.default_rng(seed).integers(0, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:28, 70:] += 140
    pixels[40:, :20] += 70
    return pixels


def stored(orientation, seed=0):
    """A PIL picture as a camera wrote it, its tag in place."""
    picture = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright_pixels(seed))))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture.info["exif"] = exif.tobytes()
    return picture


def written(path, orientation, seed=0):
    picture = stored(orientation, seed)
    picture.save(path, exif=picture.info["exif"])
    return path


@pytest.fixture(scope="module")
def embedded():
    folder = embedded_model_dir()
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("orientation", STORED)
def test_what_we_open_is_upright_and_has_no_tag_left(orientation, tmp_path):
    path = written(tmp_path / "photo.png", orientation)
    for given in (path, str(path)):
        picture = open_upright(given)
        assert np.array_equal(np.asarray(picture), upright_pixels())
        for made in (picture, picture.convert("RGB").resize((56, 28))):
            assert made.getexif().get(ORIENTATION, 1) == 1
    with Image.open(path) as file:
        assert file.getexif()[ORIENTATION] == orientation  # it is as it was


def test_a_picture_keeps_the_mode_of_its_file(tmp_path):
    for mode in ("RGBA", "L", "P", "1"):
        Image.fromarray(upright_pixels()).convert(mode).save(tmp_path / "photo.png")
        assert open_upright(tmp_path / "photo.png").mode == mode
    with pytest.raises(FileError, match="none.png' cannot be read as a picture"):
        open_upright(tmp_path / "none.png")


def statements(picture):
    yield lambda: Saliency.from_boxes((0, 0, 20, 20), picture)
    yield lambda: Saliency.from_boxes((0.1, 0.1, 0.4, 0.4), picture, unit="fraction")
    yield lambda: Saliency.from_points((9, 9), picture)
    yield lambda: Saliency.from_scribble([(9, 9), (30, 30)], 4, picture)
    yield lambda: Saliency.from_mask(np.ones((4, 4)), image_size=picture)
    yield lambda: Saliency.from_map(np.ones((4, 4)), image_size=picture)
    yield lambda: Saliency.from_mask(picture.convert("L"))


@pytest.mark.parametrize("orientation", LYING)
def test_an_opened_picture_that_its_tag_asks_to_turn_is_refused_with_the_remedy(orientation):
    lying = stored(orientation)
    for opened in (lying, lying.convert("RGB")):  # converting keeps the tag
        for say in statements(opened):
            with pytest.raises(SaliencyError, match=r"EXIF tag asks to turn it.*exif_transpose\(picture\).*\(width, height\)"):
                say()
    for say in statements(ImageOps.exif_transpose(lying)):
        assert say().regions[0].size == (WIDTH, HEIGHT)
    Saliency.from_boxes((0, 0, 20, 20), lying.size)


def test_a_picture_that_lies_as_it_should_is_taken():
    for say in statements(stored(1)):
        assert say().regions[0].size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("orientation", STORED)
def test_a_mask_is_turned_like_its_picture(orientation, tmp_path):
    lying = stored(orientation)
    lying.convert("L").point(lambda value: 255 * (value > 120)).save(tmp_path / "mask.png", exif=lying.info["exif"])
    (region,) = Saliency.from_mask(tmp_path / "mask.png").regions
    expected = np.asarray(Image.fromarray(upright_pixels()).convert("L")) > 120
    assert region.paint.values.bool().tolist() == expected.tolist()
    assert 0.05 < expected.mean() < 0.5


def pixels_for(processor, image):
    return processor(text=["<|vision_start|><|image_pad|><|vision_end|>"], images=[image], return_tensors="pt")["pixel_values"]


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning")
def test_a_processor_leaves_an_opened_picture_as_it_lies_and_a_path_depends_on_the_release(embedded, tmp_path):
    """The facts that the rule stands on; if one changes, `picture_files.py` says something wrong."""
    _, processor = embedded
    lying = stored(6)
    raw, right = (pixels_for(processor, Image.fromarray(np.asarray(own))) for own in (lying, ImageOps.exif_transpose(lying)))
    assert torch.equal(pixels_for(processor, lying), raw)
    assert raw.shape == right.shape
    assert not torch.equal(raw, right)
    path = str(written(tmp_path / "photo.png", 6))
    turned = Version(transformers.__version__) >= Version("5.21")
    assert torch.equal(pixels_for(processor, path), right if turned else raw)
    content = [{"type": "image", "image": path}, {"type": "image", "image": lying}]
    images, _ = process_vision_info([{"role": "user", "content": content}])
    for image in images:
        assert image.size == (HEIGHT, WIDTH)
        assert image.getexif()[ORIENTATION] == 6


def test_a_shape_that_would_fit_on_its_side_is_refused_with_a_word_about_the_tag(embedded):
    """A path went to a processor that does not turn it, and the box was drawn on the picture as people see it."""
    model, processor = embedded
    lying = stored(6).resize((4 * HEIGHT, 4 * WIDTH))
    inputs = processor(text=["<|vision_start|><|image_pad|><|vision_end|>"], images=[lying], return_tensors="pt")
    for size, told_so in (((4 * WIDTH, 4 * HEIGHT), True), ((WIDTH, 9 * WIDTH), False)):
        with pytest.raises(SaliencyError, match="the model's inputs say between") as caught:
            read_saliency(model, inputs, given=Saliency.from_boxes((0, 0, 20, 20), size))
        assert ("EXIF" in str(caught.value)) == told_so
    read_saliency(model, inputs, given=Saliency.from_boxes((0, 0, 20, 20), (4 * HEIGHT, 4 * WIDTH)))


def told(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]


def address(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("orientation", STORED)
def test_a_provider_sees_every_file_upright(orientation, embedded, tmp_path):
    provider = SaliencyProvider(*embedded)
    expected, size, _ = provider.look([told({"type": "image", "image": Image.fromarray(upright_pixels())})])["image", 0, 0]
    assert size == (WIDTH, HEIGHT)
    path = written(tmp_path / "photo.png", orientation)
    for name, given in (("image", str(path)), ("image", f"file://{path}"), ("image_url", str(path)), ("image", address(path))):
        messages = told({"type": "image", name: given})
        found, size, _ = provider.look([messages])["image", 0, 0]
        assert size == (WIDTH, HEIGHT)
        if given.startswith("data:"):  # resized before it is turned: to the same, but for the last bits
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(found, expected)
        assert messages == told({"type": "image", name: given})  # the caller's own are as they were


def test_a_provider_sees_frames_upright(embedded, tmp_path):
    provider = SaliencyProvider(*embedded)
    seeds = range(4)
    upright = [Image.fromarray(upright_pixels(seed)) for seed in seeds]
    paths = [str(written(tmp_path / f"{seed}.png", 5 + seed, seed)) for seed in seeds]
    (expected, size, _), (found, own, _) = (
        provider.look([told({"type": "video", "video": frames})])["video", 0, 0] for frames in (upright, paths)
    )
    assert size == own
    assert torch.equal(found, expected)


@pytest.mark.parametrize("part", [lambda own: {"type": "image", "image": own}, lambda own: {"type": "video", "video": [own] * 4}])
def test_a_provider_refuses_an_opened_picture_that_is_yet_to_be_turned(part, embedded):
    provider = SaliencyProvider(*embedded)
    with pytest.raises(SaliencyError, match="of 56 x 112 pixels lies on its left side, and its EXIF tag asks to turn it"):
        Saliency.external(provider, told(part(stored(6))))


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_the_command_line_sees_pictures_upright(orientation, tmp_path, capsys):
    reports = []
    for number in (1, orientation):
        image = str(written(tmp_path / f"{number}.png", number))
        command = ["saliency", image, "--provider", str(embedded_model_dir()), "--source", "vision_attention", "--json"]
        assert main([*command, "--output", str(tmp_path / "drawn")]) == 0
        drawn = json.loads(capsys.readouterr().out)
        command = ["sweep", "--image", image, "--prompt", "Which digit?", "--strengths", "0,3", "--new-tokens", "2", "--json"]
        assert main([*command, "--box", "84,0,112,28", "--output", str(tmp_path / f"sweep{number}")]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        reports.append((drawn["maps"], drawn["peaks"], [(row["span_mass"], row["kl_nats"]) for row in rows]))
    assert reports[0] == reports[1]
    assert reports[0][2][0] != reports[0][2][1]


def test_examples_in_a_file_are_upright(embedded, tmp_path):
    _, processor = embedded
    examples = []
    for number in (1, 6):
        written(tmp_path / "photo.png", number)
        line = {"image": "photo.png", "question": "Which?", "box": [84, 0, 112, 28]}
        (tmp_path / "examples.jsonl").write_text(json.dumps(line) + "\n")
        examples += read_jsonl(tmp_path / "examples.jsonl", processor)
    one, other = examples
    assert one.inputs.keys() == other.inputs.keys()
    for name, value in one.inputs.items():
        assert torch.equal(value, other.inputs[name]), name
    assert one.span.regions == other.span.regions
