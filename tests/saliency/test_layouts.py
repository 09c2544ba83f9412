"""Where each token lies: against the processors that made the pixels, the models' own packing, and plain arithmetic."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kit.tiny_encoders import FRAMES, MELS, PLACEHOLDER, make_encoder_config, make_encoder_model
from qwen_vl_utils.vision_process import smart_resize as utils_resize
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionModel,
    PixtralVisionConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
    WhisperFeatureExtractor,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.image_utils import PILImageResampling
from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from hf_steer import Saliency, SaliencyError
from hf_steer.families import FAMILIES, resolve
from hf_steer.ground.arguments import Given
from hf_steer.ground.pictures import Square
from hf_steer.saliency import find_spans, read_layouts
from hf_steer.saliency.cuts import cut_in_parts
from hf_steer.saliency.layouts import LAYOUTS
from hf_steer.saliency.regions import paint_region
from hf_steer.values import Layout

AS_IT_IS = {
    "do_rescale": False, "do_normalize": False, "do_convert_rgb": False, "return_tensors": "pt",
    "resample": PILImageResampling.BILINEAR,
}
SIZES = [(48, 64), (64, 48), (31, 200), (200, 31), (30, 30), (97, 101), (150, 149)]
"""Height and width: wide, tall, square, prime."""


def anatomy_of(config, layout, **encoder):
    """What a layout function reads of a model."""
    patch_px = getattr(getattr(config, "vision_config", None), "patch_size", 0)
    return SimpleNamespace(layout=layout, root=SimpleNamespace(config=config), merge_size=2, patch_px=patch_px, encoders=encoder)


def ramp(height, width):
    """A picture whose pixels say where they are: x and y in fractions of the sides, and 1 for being there at all."""
    picture = torch.ones(3, height, width)
    picture[0] = (torch.arange(width) + 0.5) / width
    picture[1] = ((torch.arange(height) + 0.5) / height)[:, None]
    return picture


def read_off(pixels, patch):
    """`(pictures, patches, 3)` means over the patches of a tower: where each lies, as the pixels say themselves."""
    return torch.nn.functional.avg_pool2d(pixels, patch).flatten(2).mT.double()


def assert_centres(cells, said, size, processed):
    """Cells lie where their pixels say, to a fiftieth of a pixel. At the picture's edge resampling has nothing to go on.

    Args:
        cells: `(tokens, 4)` in fractions of the picture.
        said: `(tokens, 3)` x, y and presence, as the pixels say.
        size: height and width of the original, in pixels.
        processed: height and width of the whole picture after the processor resized it.
    """
    originals, pixels = (torch.tensor(sides[::-1], dtype=torch.float64) for sides in (size, processed))
    margin = (2 / torch.minimum(originals, pixels)).repeat(2)
    inside = (cells > margin).all(1) & (cells < 1 - margin).all(1)
    assert inside.sum() >= 2
    assert (said[inside, 2] > 0.999).all()
    error = ((cells[:, :2] + cells[:, 2:]) / 2 - said[:, :2])[inside].abs() * pixels
    assert error.max() < 0.02


def layouts_of(named, anatomy, *, whole=True):
    return read_layouts(Given(named), {}, anatomy, whole=whole)


def parts_of(height, width, config):
    square = Square(config.vision_config.image_size, config.vision_config.patch_size)
    pinpoints, ratio = config.image_grid_pinpoints, config.vision_aspect_ratio
    return cut_in_parts((height, width), square, resolutions_px=pinpoints, aspect_ratio=ratio).layout()


def test_every_family_that_is_shown_or_told_something_has_a_layout():
    for name, family in FAMILIES.items():
        across = name == "mllama"  # its decoder cross-attends to pictures, which have no tokens in the prompt
        assert (family.layout is not None) == (bool(family.placeholders) or across), name
        several = family.layout if isinstance(family.layout, tuple) else (family.layout,)
        assert family.layout is None or set(several) <= set(LAYOUTS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("side", "patch"), [(112, 14), (116, 14)])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_clip_shows_the_centre_square_and_siglip_the_whole(tower, size, side, patch):
    """116 pixels are eight patches of 14, and 4 pixels that no token sees."""
    height, width = size
    classes = 1 if tower == "clip" else 0
    kind, vision, sides = {
        "clip": (CLIPImageProcessor, CLIPVisionConfig, {"size": {"shortest_edge": side}, "crop_size": side}),
        "siglip": (SiglipImageProcessor, SiglipVisionConfig, {"size": {"height": side, "width": side}}),
    }[tower]
    pixels = kind(**sides)(ramp(height, width), **AS_IT_IS)["pixel_values"]
    config = make_encoder_config("llava")
    config.vision_config = vision(image_size=side, patch_size=patch)
    layouts = {}
    for strategy in ("full", "default"):
        config.vision_feature_select_strategy = strategy
        (layouts[strategy],) = layouts_of({"pixel_values": pixels}, anatomy_of(config, "llava"))["image"]
    layout = layouts["full"]
    cells = layout.at((width, height)).cells
    assert torch.isnan(cells[:classes]).all()
    assert len(cells) == classes + 64
    processed = (side, side)
    if tower == "clip":
        processed = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    assert_centres(cells[classes:], read_off(pixels, patch)[0], size, processed)
    torch.testing.assert_close(layouts["default"].cells, layout.cells[1:], rtol=0, atol=0)
    assert layout.grid == (1, 8, 8)
    assert layouts["default"].grid == ((1, 8, 8) if classes else None)  # "default" drops SigLIP's first patch


def test_a_tower_that_is_not_known_is_refused_only_when_something_is_said_of_pictures():
    config = make_encoder_config("llava")
    config.vision_config = Dinov2Config(image_size=12, patch_size=4)
    with pytest.raises(SaliencyError, match=r"towers pixtral, clip_vision_model.*'dinov2'.*from_tokens"):
        layouts_of({"pixel_values": torch.zeros(1, 3, 12, 12)}, anatomy_of(config, "llava"))
    assert layouts_of({}, anatomy_of(config, "llava")) == {}


def onevision(side, patch, most=9):
    config = make_encoder_config("llava_onevision")
    config.vision_config.image_size, config.vision_config.patch_size = side, patch
    config.image_grid_pinpoints = [[side * a, side * b] for a in range(1, 7) for b in range(1, 7)]
    config.vision_aspect_ratio = f"anyres_max_{most}"
    processor = LlavaOnevisionImageProcessor(
        size={"height": side, "width": side}, image_grid_pinpoints=config.image_grid_pinpoints
    )
    return config, processor


def packed(config, features, sizes):
    """As the model packs features, newlines as NaN."""
    newline = torch.full((features[0].shape[-1],), torch.nan, dtype=features[0].dtype)
    model = SimpleNamespace(config=config)
    return LlavaOnevisionModel.pack_image_features(model, features, sizes, newline, config.vision_aspect_ratio)[0]


def on_canvas(size, side):
    """Height and width of the resized picture, and the pixels above and to the left of it on its canvas."""
    height, width = size
    best = select_best_resolution(size, [[side * a, side * b] for a in range(1, 7) for b in range(1, 7)])
    scale = min(best[0] / height, best[1] / width)
    resized = [min(math.ceil(length * scale - 1e-9), most) for length, most in zip(size, best, strict=True)]
    return best, resized, [(most - length) // 2 for length, most in zip(resized, best, strict=True)]


@pytest.mark.parametrize("size", [*SIZES, (20, 25), (400, 300)])
@pytest.mark.parametrize("patch", [4, 7])
def test_onevision_tokens_lie_where_their_pixels_say(size, patch):
    """The real processor's parts of a ramp, patch by patch, through the model's own packing; 24 pixels are three patches of 7."""
    config, processor = onevision(24, patch)
    inputs = processor([ramp(*size)], **AS_IT_IS)
    (said,) = packed(config, [read_off(inputs["pixel_values"][0], patch)], inputs["image_sizes"])
    (layout,) = layouts_of(inputs, anatomy_of(config, "llava_onevision"))["image"]
    assert (layout.tokens, layout.size, layout.grid) == (len(said), size[::-1], None)
    base = (24 // patch) ** 2
    if min(size) > 24:
        assert_centres(layout.cells[:base], said[:base], size, (24, 24))
    if len(inputs["pixel_values"][0]) <= 1 + 9:  # with more parts patches are interpolated
        assert_centres(layout.cells[base:], said[base:], size, on_canvas(size, 24)[1])


def test_onevision_cells_equal_the_models_own_packing_for_hundreds_of_sizes():
    """Where each patch lies on the canvas, in plain loops, goes through the model's packing and comes out as the cells' middles."""
    sizes = random.Random(0)
    interpolated = set()
    for number in range(400):
        side, patch, most = [(24, 4, 9), (24, 7, 9), (24, 4, 1), (24, 7, 2)][number % 4]
        config, _ = onevision(side, patch, most)
        size = (sizes.randint(3, 300), sizes.randint(3, 300))
        best, resized, before = on_canvas(size, side)
        count = side // patch
        features = [[[(c + 0.5) * patch, (r + 0.5) * patch] for r in range(count) for c in range(count)]]
        for top in range(0, best[0], side):
            for left in range(0, best[1], side):
                features.append([[left + (c + 0.5) * patch, top + (r + 0.5) * patch] for r in range(count) for c in range(count)])
        (said,) = packed(config, [torch.tensor(features, dtype=torch.float64)], torch.tensor([size]))
        layout = parts_of(*size, config)
        assert layout.tokens == len(said)
        base = count**2
        newline = torch.isnan(said).any(1)
        assert torch.isnan(layout.cells[newline]).all()
        parts = layout.cells[base:] * torch.tensor(resized[::-1] * 2) + torch.tensor(before[::-1] * 2)
        inside = (layout.cells[base:] > 0).all(1) & (layout.cells[base:] < 1).all(1)  # the others are cut at the picture's edge
        error = ((parts[:, :2] + parts[:, 2:]) / 2 - said[base:])[inside].abs()
        widths = parts[inside, 2:] - parts[inside, :2]
        shrunk = bool(len(widths)) and bool((widths > patch + side % patch + 1e-6).any())
        interpolated.add(shrunk)
        gap = side % patch / 2 if shrunk else 0.0  # an interpolated token may reach over the gap between two parts
        assert not len(error) or error.max() < gap + 1e-6, (size, side, patch, most)
        torch.testing.assert_close(layout.cells[:base], said[:base].repeat(1, 2) / side + half_patch(patch, side))
        area = (layout.cells[base:, 2:] - layout.cells[base:, :2]).prod(1).nansum()  # but for gaps and cut edges, each place once
        assert area < 1 + 1e-6
        assert area > 0.5 or max(size) > 4 * min(size)
    assert interpolated == {False, True}


def test_the_ratio_that_generate_is_called_with_goes_before_the_configurations():
    """`generate` hands it to the encoder, and `forward` does not."""
    config, processor = onevision(24, 4, most=2)
    inputs = processor([ramp(100, 130)], **AS_IT_IS)
    parts = [torch.ones(len(inputs["pixel_values"][0]), 36, 2)]
    for ratio in (None, "anyres_max_1"):
        named = dict(inputs) if ratio is None else {**inputs, "vision_aspect_ratio": ratio}
        (layout,) = layouts_of(named, anatomy_of(config, "llava_onevision"))["image"]
        (unheeded,) = layouts_of(named, anatomy_of(config, "llava_onevision"), whole=False)["image"]
        assert unheeded.tokens == len(packed(config, parts, inputs["image_sizes"])[0])
        config.vision_aspect_ratio = ratio or config.vision_aspect_ratio
        assert layout.tokens == len(packed(config, parts, inputs["image_sizes"])[0])


def half_patch(patch, side):
    return torch.tensor([-0.5, -0.5, 0.5, 0.5], dtype=torch.float64) * patch / side


def test_a_picture_like_a_thread_keeps_its_first_square_alone():
    config, processor = onevision(24, 4)
    inputs = processor([ramp(3, 255)], **AS_IT_IS)
    (said,) = packed(config, [torch.ones(len(inputs["pixel_values"][0]), 36, 2)], inputs["image_sizes"])
    layout = parts_of(3, 255, config)
    assert len(said) == layout.tokens == 36
    assert torch.isfinite(layout.cells).all()


@pytest.mark.parametrize("patch", [4, 7])
def test_several_pictures_of_a_prompt_are_padded_to_squares(patch):
    """Two pictures together are padded; one alone is cut into parts, in the same batch."""
    config, processor = onevision(24, patch)
    sizes = [(71, 96), (90, 61), (50, 60)]  # an odd pixel of padding goes to the right or below
    inputs = processor([[ramp(*sizes[0]), ramp(*sizes[1])], [ramp(*sizes[2])]], **AS_IT_IS)
    assert inputs["batch_num_images"].tolist() == [2, 1]
    layouts = layouts_of(inputs, anatomy_of(config, "llava_onevision"))["image"]
    patches = (24 // patch) ** 2
    for size, layout, pixels in zip(sizes[:2], layouts, inputs["pixel_values"], strict=False):
        (said,) = packed(config, [read_off(pixels[:1], patch)], torch.tensor([size]))
        assert layout.tokens == len(said) == patches + 1
        assert (torch.isnan(layout.cells[-1]).all(), layout.size) == (True, size[::-1])
        height, width = size
        longest = max(size)
        before = [(longest - height) // 2, (longest - width) // 2]
        for number in range(patches):  # in plain arithmetic: from the square's pixels to the picture's
            row, column = divmod(number, 24 // patch)
            top, left = (place * patch * longest / 24 - edge for place, edge in zip((row, column), before, strict=True))
            bottom, right = top + patch * longest / 24, left + patch * longest / 24
            top, bottom = max(top / height, 0), min(bottom / height, 1)
            left, right = max(left / width, 0), min(right / width, 1)
            if right <= left or bottom <= top:
                assert torch.isnan(layout.cells[number]).all()
            else:
                expected = torch.tensor([left, top, right, bottom], dtype=torch.float64)
                torch.testing.assert_close(layout.cells[number], expected)
        assert_centres(layout.cells[:-1], said[:-1], size, (24 * height / longest, 24 * width / longest))
    torch.testing.assert_close(
        layouts[2].cells, parts_of(50, 60, config).cells, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(("side", "patch"), [(24, 4), (24, 7), (36, 4)])
def test_a_videos_tokens_lie_where_its_pooled_patches_do(side, patch):
    config, _ = onevision(side, patch)
    count = side // patch
    centres = [[(c + 0.5) * patch / side, (r + 0.5) * patch / side] for r in range(count) for c in range(count)]
    frames = torch.tensor([centres] * 3, dtype=torch.float64)
    pooled = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), frames)
    videos = {"pixel_values_videos": torch.zeros(2, 3, 3, side, side)}
    anatomy = anatomy_of(config, "llava_onevision")
    first, second = layouts_of(videos, anatomy)["video"]
    assert first.grid == second.grid == (3, math.ceil(count / 2), math.ceil(count / 2))
    assert torch.isnan(first.cells[-1]).all()
    torch.testing.assert_close((first.cells[:-1, :2] + first.cells[:-1, 2:]) / 2, pooled.flatten(0, 1))
    sizes = (first.cells[:-1, 2:] - first.cells[:-1, :2]).prod(1).sum()
    assert sizes.item() == pytest.approx(3 * (count * patch / side) ** 2)
    encoded = {"video": SimpleNamespace(pooler_output=torch.zeros(2, first.tokens, 8))}
    assert [layout.grid for layout in layouts_of({"mm_encoder_outputs": encoded}, anatomy)["video"]] == [first.grid] * 2


def test_outputs_that_came_without_their_sizes_are_refused():
    outputs = {"image": SimpleNamespace(pooler_output=[torch.zeros(30, 8)])}
    anatomy = anatomy_of(onevision(24, 4)[0], "llava_onevision")
    with pytest.raises(SaliencyError, match="image_sizes did not come with mm_encoder_outputs.*Pass image_sizes"):
        layouts_of({"mm_encoder_outputs": outputs}, anatomy)
    sizes = {"mm_encoder_outputs": outputs, "image_sizes": torch.tensor([[24, 24]])}
    assert [layout.size for layout in layouts_of(sizes, anatomy)["image"]] == [(24, 24)]


def shape_is_refused(layout, width, height):
    (region,) = Saliency.from_boxes((0, 0, width, height), (width, height)).regions
    try:
        paint_region(region, layout, 1)
    except SaliencyError as error:
        return "Give image_size=(width, height) of the original picture" in str(error)
    return False


@pytest.mark.parametrize(("least", "most"), [(4, 1280), (4, 16384), (256, 1280), (4, 64)])
def test_no_rounding_of_qwens_processor_is_mistaken_for_another_shape(least, most):
    """Sides become whole tokens of 28 pixels between two bounds; qwen-vl-utils may have done the same before."""
    sizes, refused = random.Random(0), 0
    for number in range(1500):
        width, height = (round(math.exp(sizes.uniform(math.log(16), math.log(4000)))) for _ in range(2))
        if max(width, height) > 20 * min(width, height):
            continue
        before = utils_resize(height, width, factor=28) if number % 2 else (height, width)
        rows, columns = (side // 28 for side in smart_resize(*before, 28, least * 784, most * 784))
        config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=14))
        named = {"image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]])}
        (layout,) = layouts_of(named, anatomy_of(config, "qwen"))["image"]
        assert layout.grid == (1, rows, columns)
        assert not shape_is_refused(layout, width, height), (width, height, before, rows, columns)
        if min(rows, columns) >= 12 and max(width, height) > 2 * min(width, height) > 400:
            refused += 1
            assert shape_is_refused(layout, height, width)  # width and height mixed up
    assert refused > 20 or most == 64


def test_pixtrals_grid_and_its_rounding_are_known():
    """Sides are rounded down to pixels, then up to patches of 16."""
    sizes = random.Random(0)
    config = make_encoder_config("llava")
    config.vision_config = PixtralVisionConfig(patch_size=16, image_size=1024)
    for _ in range(300):
        width, height = sizes.randint(16, 3000), sizes.randint(16, 3000)
        resized = get_resize_output_image_size(torch.empty(3, height, width, device="meta"), 1024, 16)
        named = {"pixel_values": torch.zeros(1, 3, 1, 1), "image_sizes": torch.tensor([resized])}
        (layout,) = layouts_of(named, anatomy_of(config, "llava"))["image"]
        assert layout.grid == (1, resized[0] // 16, resized[1] // 16)
        assert not shape_is_refused(layout, width, height)
        if min(resized) > 300 and max(width, height) > 1.5 * min(width, height):
            assert shape_is_refused(layout, height, width)
    alone = layouts_of({"pixel_values": torch.zeros(2, 3, 32, 48)}, anatomy_of(config, "llava"))["image"]
    assert [layout.grid for layout in alone] == [(1, 2, 3)] * 2


def test_onevision_knows_the_size_itself():
    layout = parts_of(480, 640, onevision(24, 4)[0])
    for width, height in ((640, 480), (320, 240), (321, 240), (1, 1)):  # whole pixels of a smaller copy may be one off
        assert not shape_is_refused(layout, width, height)
    for width, height in ((480, 640), (640, 500), (1000, 1000)):
        assert shape_is_refused(layout, width, height)


@pytest.mark.parametrize("family", ["qwen2_audio", "audioflamingo3"])
def test_a_sound_has_the_seconds_and_tokens_that_its_mask_gives(family):
    model = make_encoder_model(family)
    anatomy = resolve(model)
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1)
    samples = [1600, 4001, 15999, 16000, 20000]
    made = extractor(
        [np.ones(count, dtype=np.float32) for count in samples], sampling_rate=16000, return_attention_mask=True,
        return_tensors="pt",
    )
    layouts = layouts_of({anatomy.encoders["audio"].mask: made["attention_mask"]}, anatomy)["audio"]
    for count, layout in zip(samples, layouts, strict=True):
        frames = min(math.ceil(count / 160), 100)
        assert layout.size[0] == pytest.approx(frames / 100)
        assert layout.tokens == (frames + 1) // 4
        for token, (start, end) in enumerate(layout.cells.tolist()):
            assert (start, end) == (pytest.approx(token * 0.04), pytest.approx(token * 0.04 + 0.04))
        full = frames == 100  # the extractor cuts what is longer
        assert layout.slack == (math.inf if full else 0.01)
        assert layout.continues == (full and family == "audioflamingo3")


@pytest.mark.parametrize("family", ["qwen2_audio", "audioflamingo3", "voxtral"])
def test_the_tokens_of_a_sound_are_as_many_as_the_model_makes(family):
    model = make_encoder_model(family)
    anatomy = resolve(model)
    features, lengths = torch.randn(3, MELS, 2 * FRAMES), (40, 23, 14)
    mask = torch.zeros(3, 2 * FRAMES, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    named = {"input_features": features, **({} if family == "voxtral" else {anatomy.encoders["audio"].mask: mask})}
    counts = [layout.tokens for layout in layouts_of(named, anatomy)["audio"]]
    assert counts == ([5, 5, 5] if family == "voxtral" else [(length + 1) // 4 for length in lengths])
    ids = torch.tensor([[1, *[PLACEHOLDER] * counts[0], 2, *[PLACEHOLDER] * counts[1], 3, *[PLACEHOLDER] * counts[2]]])
    with torch.no_grad():
        model(input_ids=ids, **named)  # refuses any other number of placeholders


def window(frames, *, continues=False):
    edges = torch.arange(frames + 1, dtype=torch.float64) / 10
    return Layout(cells=torch.stack([edges[:-1], edges[1:]], 1), size=(frames / 10,), slack=0.01, continues=continues)


def test_windows_of_a_long_sound_become_one_span_where_no_token_lies_between():
    """Row 0: a sound of two full windows and a rest, then another; row 1: a full window, text, a full window."""
    ids = torch.tensor([[9] * 8 + [1] + [9] * 2 + [1], [9] * 3 + [1] + [9] * 3 + [1] * 5])
    full, rest = window(3, continues=True), window(2)
    layouts = {"audio": [full, full, rest, rest, full, full]}
    spans = find_spans(ids, {"audio": 9}, layouts)
    found = [(span.row, span.index, span.positions.tolist()) for span in spans]
    assert found == [
        (0, 0, list(range(8))), (0, 1, [9, 10]), (1, 0, [0, 1, 2]), (1, 1, [4, 5, 6]),
    ]  # fmt: skip
    expected = torch.arange(9, dtype=torch.float64) / 10
    torch.testing.assert_close(spans[0].layout.cells, torch.stack([expected[:-1], expected[1:]], 1))
    assert spans[0].layout.size == pytest.approx((0.8,))
    assert not spans[0].layout.continues
    rows = find_spans(torch.tensor([[9, 9, 9, 1, 1, 1], [1, 1, 1, 9, 9, 9]]), {"audio": 9}, {"audio": [full, full]})
    assert [(span.row, span.index) for span in rows] == [(0, 0), (1, 0)]  # never from row to row
    apart = find_spans(torch.tensor([[9] * 4]), {"audio": 9}, {"audio": [rest, rest]})  # not full: two sounds side by side
    assert [span.index for span in apart] == [0, 1]


@pytest.mark.parametrize("layouts", [[window(3)], [window(5)], [], [Layout(cells=torch.zeros(0, 2), size=(0.02,)), window(4)]])
def test_a_number_of_sound_tokens_that_does_not_match_is_an_error(layouts):
    made = [layout.tokens for layout in layouts]
    with pytest.raises(SaliencyError, match=rf"rows hold \[4\] audio tokens, the audio inputs make \[{str(made)[1:-1]}\]"):
        find_spans(torch.tensor([[9, 9, 9, 9, 1]]), {"audio": 9}, {"audio": layouts})
