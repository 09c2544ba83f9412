"""Boxes on the pictures of a decoder that cross-attends to them (Mllama), by the oracle of changed pixels: it knows no layout."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from kit.crossing import biased
from kit.pictured import ACROSS, PATCH, SIDE, make_pictured_model, make_processor, noise_picture, without_mixing
from kit.versions import cache_of
from PIL import Image
from transformers.models.mllama import image_processing_mllama as mllama

from hf_steer import AttentionConfig, Saliency, SaliencyConfig, SaliencyError, patch_model
from hf_steer.ground.tilings import least_scaled
from hf_steer.patching.gaze.memory import read_state

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")  # of Mllama itself, up to 5.19
SIZES = [(20, 20), (70, 110), (131, 67), (20, 90), (97, 101), (150, 30), (40, 40)]
"""Height and width: smaller than a tile, wide, tall, strips, almost square and prime, smaller than its canvas."""
BOXES = [(0.0, 0.0, 0.3, 0.3), (0.55, 0.1, 0.9, 0.35), (0.1, 0.6, 0.4, 1.0), (0.35, 0.35, 0.7, 0.7), (0.75, 0.7, 1.0, 1.0)]
"""Left, top, right, bottom, in fractions."""
TILES, POSITIONS = 4, (SIDE // PATCH) ** 2 + 1
AS_GIVEN = SaliencyConfig(source=None, normalize="none", preserve_mass=False)


@functools.cache
def built():
    processor = make_processor(ACROSS)
    model = make_pictured_model(ACROSS, processor.tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1:  # gates, closed at first
                parameter.fill_(0.7)
    return processor, model


@functools.cache
def steered():
    """The same model, patched."""
    model = make_pictured_model(ACROSS, built()[0].tokenizer)
    model.load_state_dict(built()[1].state_dict())
    return patch_model(model, AttentionConfig(attends="cross", strength=2.0, saliency=AS_GIVEN))


def processed(*rows):
    """What the processor makes of rows of pictures."""
    texts = [f"{' w3 '.join([ACROSS.written] * len(row))} w1 w2" for row in rows]
    images = [[Image.fromarray(own) for own in row] for row in rows]
    return dict(built()[0](images=images, text=texts, return_tensors="pt", padding=True))


def seen(inputs):
    """`(rows, positions, features)` that the model's eye hands on, each position of its own patch alone."""
    _, model = built()
    given = {name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with torch.no_grad(), without_mixing(model):
        states = model.model.vision_model(**given).last_hidden_state
    return states.reshape(len(states), -1, states.shape[-1])


@torch.no_grad()
def scores_of(inputs, saliency):
    """`(rows, positions)` that steer a pass."""
    return read_state(cache_of(steered()(**inputs, saliency=saliency, use_cache=True))).scores.values


def boxed(box, size, grown=0):
    """A box in whole pixels, so many larger on each side, clipped."""
    height, width = size
    left, top, right, bottom = (round(part * side) for part, side in zip(box, (width, height) * 2, strict=True))
    return max(left - grown, 0), max(top - grown, 0), min(right + grown, width), min(bottom + grown, height)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_box_lights_the_positions_whose_features_its_pixels_change(size):
    """A box that is smaller by what resizing spreads lights none that do not change, a larger one all that do."""
    height, width = size
    picture = noise_picture(*size)
    inputs = processed([picture])
    before = seen(inputs)[0]
    assert len(before) == TILES * POSITIONS
    told = 0
    for number, box in enumerate(BOXES):
        left, top, right, bottom = boxed(box, size)
        other = picture.copy()
        other[top:bottom, left:right] = noise_picture(bottom - top, right - left, seed=number + 1)
        difference = (seen(processed([other]))[0] - before).abs().amax(1)
        changed = difference > 1e-5 * difference.max()
        assert changed.any()
        slack = max(1, round(min(size) / 24))
        inner, outer = (
            scores_of(inputs, Saliency.from_boxes(boxed(box, size, by), (width, height)))[0] > 0 for by in (-slack, 2 * slack)
        )
        assert inner.any()
        assert not (inner & ~changed).any(), (box, (inner & ~changed).nonzero().flatten())
        assert not (changed & ~outer).any(), (box, (changed & ~outer).nonzero().flatten())
        told += int((inner | ~outer).sum())
    assert told > 0.7 * len(BOXES) * len(before)


def test_the_class_token_of_a_tile_and_what_is_padding_get_nothing():
    picture = noise_picture(70, 110)
    scores = scores_of(processed([picture]), Saliency.from_boxes((0, 0, 110, 70), (110, 70)))[0].view(TILES, POSITIONS)
    assert not scores[:, 0].any()
    rows, columns = (round(share * 2 * SIDE / PATCH) for share in (70 / 110, 1))  # two tiles a side; the canvas is as wide as it
    grid = scores[:, 1:].view(2, 2, SIDE // PATCH, SIDE // PATCH).transpose(1, 2).reshape(2 * SIDE // PATCH, -1)
    assert bool((grid[:rows, :columns] > 0).all())
    assert not grid[rows + 1 :].any()


def test_several_pictures_in_several_rows_are_told_apart():
    """Each lights what it lights alone; a row may have fewer than another."""
    sizes = [(70, 110), (131, 67), (20, 20)]
    pictures = [noise_picture(*size, seed=number) for number, size in enumerate(sizes)]
    together = processed(pictures[:2], pictures[2:])
    for number, (row, image) in enumerate(((0, 0), (0, 1), (1, 0))):
        size = sizes[number][::-1]
        box = boxed((0.1, 0.2, 0.5, 0.6), sizes[number])
        alone = scores_of(processed([pictures[number]]), Saliency.from_boxes(box, size))[0]
        found = scores_of(together, Saliency.from_boxes(box, size, row=row, image=image))
        expected = torch.zeros(2, 2, TILES * POSITIONS)
        expected[row, image] = alone
        assert alone.any()
        assert torch.equal(found, expected.flatten(1))
    with pytest.raises(SaliencyError, match="no image 1 in row 1: .* row 1 holds 1 of them"):
        scores_of(together, Saliency.from_boxes((0, 0, 5, 5), (110, 70), row=1, image=1))


@torch.no_grad()
@pytest.mark.parametrize("said", ["boxes", "mask", "points", "scribble"])
def test_what_is_said_of_a_picture_steers_as_its_scores_do_in_the_oracle(said):
    height, width = 70, 110
    mask = np.zeros((height, width), dtype=bool)
    mask[10:50, 30:80] = True
    how = {"row": 1}
    saliency = {
        "boxes": lambda: Saliency.from_boxes((30, 10, 80, 50), (width, height), **how),
        "mask": lambda: Saliency.from_mask(mask, **how),
        "points": lambda: Saliency.from_points((40, 20), (width, height), **how),
        "scribble": lambda: Saliency.from_scribble([(30, 10), (80, 50)], 8, (width, height), **how),
    }[said]()
    inputs = processed([noise_picture(131, 67)], [noise_picture(height, width, seed=1)])
    scores = scores_of(inputs, saliency)
    assert scores[1].any()
    assert not scores[0].any()
    bias = 2.0 * scores[:, None].expand(-1, 4, -1)
    with biased(built()[1], bias) as (twin, _):
        expected = twin(**inputs).logits
    found = steered()(**inputs, saliency=saliency).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)  # float32, other order of sums
    assert not torch.allclose(found, steered()(**inputs).logits, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_a_box_steers_what_is_generated_as_its_scores_do(how):
    """Rows are counted as the caller counts them, before they are repeated for beams."""
    inputs = processed([noise_picture(131, 67)], [noise_picture(70, 110, seed=1)])
    box = Saliency.from_boxes((30, 10, 80, 50), (110, 70), row=1)
    scores = Saliency.from_tokens(scores_of(inputs, box))
    asked = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
             "eos_token_id": None, **how}  # fmt: skip
    plain, one, other = (
        torch.stack(steered().generate(**inputs, **asked, **said).logits) for said in ({}, {"saliency": box}, {"saliency": scores})
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, plain)


def test_canvases_are_those_of_the_processor_for_hundreds_of_shapes():
    shapes = np.random.default_rng(0).integers(16, 2500, (300, 2))
    for height, width in shapes.tolist():
        canvas = least_scaled((height, width), 560, 4)
        chosen = tuple(int(side) // 560 for side in mllama.get_optimal_tiled_canvas(height, width, 4, 560))
        assert (canvas.rows, canvas.columns) == chosen
        assert 0 < canvas.height <= 1
        assert 0 < canvas.width <= 1


def test_what_does_not_fit_is_an_error_that_says_what_would():
    inputs = processed([noise_picture(70, 110)])
    other = pytest.raises(SaliencyError, match=r"the model's inputs hold 2 x 2 tiles of it, .* Give image_size=.*from_tokens")
    with other:
        scores_of(inputs, Saliency.from_boxes((10, 10, 20, 20), (300, 40)))
    with pytest.raises(SaliencyError, match="aspect_ratio_ids did not come with"):
        states = built()[1].model.vision_model(
            **{name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        ).last_hidden_state
        states = built()[1].model.multi_modal_projector(states).reshape(-1, states.shape[-2], 32)
        left = {name: value for name, value in inputs.items() if name not in ("pixel_values", "aspect_ratio_ids")}
        scores_of({**left, "cross_attention_states": states}, Saliency.from_boxes((10, 10, 20, 20), (110, 70)))
    for said, noun in ((Saliency.from_seconds((0, 1)), "seconds"), (Saliency.from_boxes((1, 1, 5, 5), (9, 9), video=0), "videos")):
        with pytest.raises(SaliencyError, match=f"where {noun} lie among what the encoder of 'mllama' hands on is not known"):
            scores_of(inputs, said)
    own = make_pictured_model(ACROSS, built()[0].tokenizer)
    patch_model(own, AttentionConfig(strength=2.0, saliency=AS_GIVEN))
    with pytest.raises(SaliencyError, match=r"the prompt of 'mllama' has no tokens for it.*attends=\"cross\""):
        own(**inputs, saliency=Saliency.from_boxes((10, 10, 20, 20), (110, 70)))
