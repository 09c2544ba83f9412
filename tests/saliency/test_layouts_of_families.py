"""A box lights the tokens whose features change when the picture's pixels in it change: an oracle that knows no layout."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kit.pictured import KINDS, features_of, make_model_without_places, make_pictured_model, make_processor, noise_picture
from kit.versions import LLAMA4_RUNS
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d
from transformers import Idefics3ImageProcessor, SiglipImageProcessor
from transformers.image_utils import SizeDict
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.cohere2_vision import image_processing_cohere2_vision as cohere2_vision
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nModel
from transformers.models.got_ocr2 import image_processing_got_ocr2 as got_ocr2
from transformers.models.llama4 import image_processing_llama4 as llama4

from hf_steer import (
    AttentionConfig,
    Saliency,
    SaliencyConfig,
    SaliencyError,
    SteerConfig,
    patch_model,
    unpatch_model,
)
from hf_steer.families import FAMILIES, resolve
from hf_steer.ground.arguments import Given
from hf_steer.ground.tilings import least_enlarged, least_padded, nearest_ratio, rounded_up
from hf_steer.saliency import find_spans, read_layouts, scores_from_user

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of processors of GLM and InternVL
SIZES = [(64, 64), (70, 110), (131, 67), (50, 150), (97, 101)]
"""Height and width: square, wide, tall, a strip, almost square and prime."""
BOXES = [(0.0, 0.0, 0.3, 0.3), (0.55, 0.1, 0.9, 0.35), (0.1, 0.6, 0.4, 1.0), (0.35, 0.35, 0.7, 0.7), (0.75, 0.7, 1.0, 1.0)]
"""Left, top, right, bottom, in fractions."""


@functools.cache
def built(family):
    processor = make_processor(KINDS[family])
    model = make_pictured_model(KINDS[family], processor.tokenizer)
    return processor, model, resolve(model)


def processed(family, *rows):
    """What the family's processor makes of rows of pictures."""
    processor, _, _ = built(family)
    texts = [f"w1 w2 {' w3 '.join([KINDS[family].written] * len(row))} w4" for row in rows]
    images = [[Image.fromarray(own) for own in row] for row in rows]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


def scores_of(family, inputs, saliency):
    """`(batch, tokens)` what a statement gives each token of the prompt."""
    _, _, anatomy = built(family)
    ids = inputs["input_ids"]
    layouts = read_layouts(Given(inputs), {}, anatomy, whole=True)
    spans = find_spans(ids, anatomy.placeholder_ids, layouts)
    real = torch.ones_like(ids, dtype=torch.bool)
    return scores_from_user(saliency, spans, real=real, first_position=0, temporal_patch_size=1).values


def lit(family, inputs, saliency):
    """`(placeholder tokens,)` which of them a statement gives a score."""
    placeholders = inputs["input_ids"] == built(family)[2].placeholder_ids["image"]
    try:
        return scores_of(family, inputs, saliency)[placeholders] > 0
    except SaliencyError as error:
        if "lies where no token looks" not in str(error):  # beside CLIP's centre square
            raise
        return torch.zeros(int(placeholders.sum()), dtype=torch.bool)


def boxed(box, size, grown=0):
    """A box in whole pixels, so many larger on each side, clipped."""
    height, width = size
    left, top, right, bottom = (round(part * side) for part, side in zip(box, (width, height) * 2, strict=True))
    return max(left - grown, 0), max(top - grown, 0), min(right + grown, width), min(bottom + grown, height)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", KINDS)
def test_a_box_lights_the_tokens_whose_features_its_pixels_change(family, size):
    """Resizing spreads a pixel over its neighbours, so what a box that is smaller by as much lights must change, and what one that
    is larger by as much does not light must not.
    """
    height, width = size
    _, model, _ = built(family)
    picture = noise_picture(*size)
    inputs = processed(family, [picture])
    before = features_of(model, inputs)
    assert len(before) == int((inputs["input_ids"] == built(family)[2].placeholder_ids["image"]).sum())
    told = 0
    for number, box in enumerate(BOXES):
        left, top, right, bottom = boxed(box, size)
        other = picture.copy()
        other[top:bottom, left:right] = noise_picture(bottom - top, right - left, seed=number + 1)
        difference = (features_of(model, processed(family, [other])) - before).abs().amax(1)
        changed = difference > 1e-5 * difference.max()
        inner, outer = (lit(family, inputs, Saliency.from_boxes(boxed(box, size, by), (width, height))) for by in (-5, 8))
        assert not (inner & ~changed).any(), (box, (inner & ~changed).nonzero().flatten())
        assert not (changed & ~outer).any(), (box, (changed & ~outer).nonzero().flatten())
        told += int((inner | ~outer).sum())
        assert inner.any() or not changed.any()
    assert told > 0.5 * len(BOXES) * len(before)


@contextlib.contextmanager
def patched(family):
    """Its model, steered in its last layer that attends, by what the user says alone."""
    _, model, anatomy = built(family)
    saliency = SaliencyConfig(source=None, normalize="none", preserve_mass=False)
    heads = {anatomy.layers[-1].index: (0, 1)}
    attention = AttentionConfig(heads=heads, strength=3.0, saliency=saliency, queries="all")
    patch_model(model, SteerConfig(attention=attention))
    try:
        yield model
    finally:
        unpatch_model(model)


@torch.no_grad()
@pytest.mark.parametrize("family", KINDS)
def test_a_box_steers_as_its_scores_do(family, monkeypatch):
    if family == "llama4" and not LLAMA4_RUNS:
        monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    size, box = (70, 110), Saliency.from_boxes((30, 10, 80, 50), (110, 70))
    inputs = processed(family, [noise_picture(*size)])
    scores = scores_of(family, inputs, box)
    assert scores.any()
    with patched(family) as model:
        plain = model(**inputs).logits
        steered = model(**inputs, saliency=box).logits
        assert not torch.equal(steered, plain)
        assert torch.equal(steered, model(**inputs, saliency=Saliency.from_tokens(scores)).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "internvl", "qwen3_5", "glm4v", "mistral3", "gemma4"])
def test_a_box_steers_what_is_generated_as_its_scores_do(family):
    box = Saliency.from_boxes((30, 10, 80, 50), (110, 70))
    inputs = processed(family, [noise_picture(70, 110)])
    scores = Saliency.from_tokens(scores_of(family, inputs, box))
    asked = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    with patched(family) as model:
        plain, one, other = (
            torch.stack(model.generate(**inputs, **asked, **said).logits) for said in ({}, {"saliency": box}, {"saliency": scores})
        )
    assert torch.equal(one, other)
    assert (one != plain).flatten(1).any(1).all()  # every step


@pytest.mark.parametrize("family", sorted(set(KINDS) - {"llava_onevision"}))  # which lays out several pictures otherwise than one
def test_several_pictures_in_several_rows_are_told_apart(family):
    """Each lights what it lights alone, in its own place, left padding or not."""
    sizes = [(70, 110), (131, 67), (64, 64)]
    first, second, third = (noise_picture(*size, seed=number) for number, size in enumerate(sizes))
    together = processed(family, [first, second], [third])
    assert not together["attention_mask"].all()
    alone, expected = [], []
    for size, picture in zip(sizes, (first, second, third), strict=True):
        height, width = size
        box = boxed((0.1, 0.2, 0.5, 0.6), size)
        alone.append(lit(family, processed(family, [picture]), Saliency.from_boxes(box, (width, height))))
        expected.append((box, (width, height)))
    for number, (row, image) in enumerate(((0, 0), (0, 1), (1, 0))):
        box, size = expected[number]
        found = lit(family, together, Saliency.from_boxes(box, size, row=row, image=image))
        own = [lights if place == number else torch.zeros_like(lights) for place, lights in enumerate(alone)]
        assert torch.equal(found, torch.cat(own)), (row, image)
    with pytest.raises(SaliencyError, match="no image 2 in row 0"):
        lit(family, together, Saliency.from_boxes((0, 0, 5, 5), (110, 70), image=2))


@pytest.mark.parametrize(
    ("family", "size", "said"),
    [
        ("internvl", (60, 120), (100, 60)),  # eight tiles came; 3 x 2 are nearer to this shape than 4 x 2
        ("aya_vision", (60, 120), (60, 60)),
        ("cohere2_vision", (60, 120), (60, 60)),
        ("llama4", (60, 120), (60, 60)),
        ("idefics3", (60, 120), (100, 100)),
        ("kimi_k25", (60, 120), (60, 60)),
    ],
)
def test_a_picture_of_a_shape_that_makes_other_tiles_is_refused(family, size, said):
    inputs = processed(family, [noise_picture(*size)])
    assert scores_of(family, inputs, Saliency.from_boxes((10, 10, 50, 50), size[::-1])).any()
    with pytest.raises(SaliencyError, match=r"one of this shape does not make so many\. Give image_size=.*from_tokens"):
        scores_of(family, inputs, Saliency.from_boxes((10, 10, 50, 50), said))


def arrangements(height, width):
    """Of each way to cut: rows and columns of tiles, as transformers' processors choose them, and ours."""
    for most in (6, 12):
        columns, rows = got_ocr2.get_optimal_tiled_canvas((height, width), (448, 448), 1, most)
        yield (rows, columns), nearest_ratio((height, width), 448, rows * columns)
        coarse = max(1, round(height / 4)), max(1, round(width / 4))  # a mask of a quarter of the size
        yield (rows, columns), nearest_ratio(coarse, 448, rows * columns)
        columns, rows = (int(side) for side in cohere2_vision.get_optimal_tiled_canvas((height, width), (512, 512), 1, most))
        yield (rows, columns), least_enlarged((height, width), 512, rows * columns)
    llama4.find_supported_resolutions.cache_clear()
    resolutions = llama4.find_supported_resolutions(max_num_chunks=16, patch_size=SizeDict(height=336, width=336))
    rows, columns = (int(side) // 336 for side in llama4.get_best_fit((height, width), torch.tensor(resolutions)))
    yield (rows, columns), least_padded((height, width), 336, rows * columns)
    splitting = Idefics3ImageProcessor(size={"longest_edge": 4 * 364}, max_image_size={"longest_edge": 364})
    _, rows, columns = splitting.get_number_of_image_patches(height, width, {})
    yield (rows, columns), rounded_up((height, width), 364, rows * columns)


def test_tiles_are_arranged_as_processors_arrange_them_for_hundreds_of_shapes():
    """A number of tiles and the picture's shape tell how many rows and columns there are."""
    shapes = random.Random(0)
    for number in range(300):
        height = shapes.randint(16, 2500)
        widths = (height, int(shapes.choice((1.5, 2, 3)) * height), shapes.randint(16, 2500), shapes.randint(16, 2500))
        width = widths[number % 4]
        for chosen, canvas in arrangements(height, width):
            assert canvas is not None, (height, width, chosen)
            assert (canvas.rows, canvas.columns) == chosen, (height, width)


def test_a_family_whose_layout_is_not_known_takes_scores_of_tokens_and_refuses_boxes():
    """Idefics2's picture tokens are what a resampler made of the whole picture, and lie nowhere in it."""
    model = make_model_without_places()
    inputs = {"input_ids": torch.tensor([[3, 4, *[30] * 4, 5, 6]]), "pixel_values": torch.randn(1, 1, 3, 32, 32)}
    scores = torch.zeros(1, 8)
    scores[0, 3] = 1
    saliency = SaliencyConfig(source=None, normalize="none")
    with torch.no_grad():
        plain = model(**inputs).logits
        patch_model(model, SteerConfig(attention=AttentionConfig(heads={1: (0,)}, strength=2.0, saliency=saliency)))
        assert torch.equal(model(**inputs).logits, plain)
        assert not torch.equal(model(**inputs, saliency=Saliency.from_tokens(scores)).logits, plain)
        box, mask = Saliency.from_boxes((0, 0, 5, 5), (10, 10)), Saliency.from_mask(np.ones((4, 4)))
        for said in (box, mask, Saliency.from_seconds((0, 1))):
            for run in (model, functools.partial(model.generate, max_new_tokens=1)):
                with pytest.raises(SaliencyError, match=r"not known for 'idefics2'\. Give one score per token"):
                    run(**inputs, saliency=said)


def test_a_modality_whose_places_are_not_known_is_named_beside_those_that_are():
    inputs = processed("gemma3", [noise_picture(40, 40)])
    refused = pytest.raises(SaliencyError, match="of video 0.*not known for 'gemma3', though it is for image")
    with patched("gemma3") as model, refused:
        model(**inputs, saliency=Saliency.from_boxes((0, 0, 5, 5), (10, 10), video=0))


def test_pictures_and_videos_that_share_a_token_are_refused_together():
    """GLM-4V's frames stand for pictures; each is one."""
    _, _, anatomy = built("glm4v")
    grids = {"image_grid_thw": torch.tensor([[1, 4, 6]]), "video_grid_thw": torch.tensor([[2, 4, 8]])}
    (frames,) = read_layouts(Given({"video_grid_thw": grids["video_grid_thw"]}), {}, anatomy, whole=True).values()
    assert [layout.grid for layout in frames] == [(1, 2, 4)] * 2
    with pytest.raises(SaliencyError, match="stand for one token in the prompts of 'glm4v'"):
        read_layouts(Given(grids), {}, anatomy, whole=True)


def test_places_that_did_not_come_with_the_pixels_are_asked_for():
    _, _, anatomy = built("gemma4")
    inputs = processed("gemma4", [noise_picture(40, 40)])
    del inputs["image_position_ids"]
    with pytest.raises(SaliencyError, match="image_position_ids did not come with pixel_values"):
        read_layouts(Given(inputs), {}, anatomy, whole=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_box_lights_the_tokens_of_gemma_3n(size):
    """Its tower is timm's, and not built here: a mean over each sixteenth of the square stands in for it."""
    height, width = size
    embeds = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(hidden_size=3), vision_soft_tokens_per_image=16, image_token_id=7),
        vision_tower=lambda pixel_values, **_: SimpleNamespace(last_hidden_state=adaptive_avg_pool2d(pixel_values, 4)),
        embed_vision=lambda inputs_embeds: inputs_embeds,
    )
    anatomy = SimpleNamespace(
        layout=FAMILIES["gemma3n"].layout, root=embeds, placeholder_ids={"image": 7}, family="gemma3n", patch_px=0
    )
    features = inspect.unwrap(Gemma3nModel.get_image_features)
    picture, processor = noise_picture(*size), SiglipImageProcessor(size={"height": 32, "width": 32})
    other, box = picture.copy(), (0.05, 0.55, 0.45, 0.95)
    left, top, right, bottom = boxed(box, size)
    other[top:bottom, left:right] = 255
    before, after = (processor(Image.fromarray(own), return_tensors="pt")["pixel_values"] for own in (picture, other))
    difference = features(embeds, after).pooler_output - features(embeds, before).pooler_output
    changed = difference[0].abs().amax(1) > 1e-3
    ids = torch.tensor([[1, *[7] * 16, 2]])
    spans = find_spans(ids, {"image": 7}, read_layouts(Given({"input_ids": ids, "pixel_values": before}), {}, anatomy, whole=True))
    inner, outer = (
        scores_from_user(
            Saliency.from_boxes(boxed(box, size, by), (width, height)), spans, real=torch.ones_like(ids), first_position=0,
            temporal_patch_size=1,
        ).values[0, 1:17] > 0
        for by in (-5, 8)
    )  # fmt: skip
    assert inner.any()
    assert not (inner & ~changed).any()
    assert not (changed & ~outer).any()
