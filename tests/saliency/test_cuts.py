"""What a LLaVA's tower saw is laid out as the model itself lays its features out, to the last bit."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from kit.tiny_encoders import make_encoder_config
from transformers import LlavaOnevisionModel
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from hf_steer.ground.pictures import Square
from hf_steer.saliency.cuts import Padded, Pooled, Whole, cut_in_parts

SHAPES = [(24, 4, 9), (24, 7, 9), (24, 4, 1), (24, 7, 2)]
"""Side and patch in pixels, and `anyres_max_<most>`."""


def config_of(side, patch):
    config = make_encoder_config("llava_onevision")
    config.vision_config.image_size, config.vision_config.patch_size = side, patch
    config.image_grid_pinpoints = [[side * a, side * b] for a in range(1, 7) for b in range(1, 7)]
    return config


def packed(config, features, size, ratio):
    """By the model's own method, zeros for newlines."""
    model = SimpleNamespace(config=config)
    newline = torch.zeros(features.shape[-1])
    (found,), _ = LlavaOnevisionModel.pack_image_features(model, [features], torch.tensor([size]), newline, ratio)
    return found


@pytest.mark.parametrize(("side", "patch", "most"), SHAPES)
def test_parts_are_laid_out_as_the_model_packs_them_for_hundreds_of_sizes(side, patch, most):
    sizes = random.Random(most + patch)
    config, ratio = config_of(side, patch), f"anyres_max_{most}"
    interpolated = set()
    for _ in range(120):
        size = sizes.randint(3, 300), sizes.randint(3, 300)
        cut = cut_in_parts(size, Square(side, patch), resolutions_px=config.image_grid_pinpoints, aspect_ratio=ratio)
        assert cut.takes == image_size_to_num_patches(size, config.image_grid_pinpoints, side)
        features = torch.rand(cut.takes, (side // patch) ** 2, 2)
        found = cut.lay(features)
        assert torch.equal(found, packed(config, features, size, ratio)), size
        layout = cut.layout()
        assert len(found) == layout.tokens
        assert not found[torch.isnan(layout.cells).any(1)].any()  # newlines
        interpolated.add(cut.tokens != cut.kept)
    assert interpolated == {False, True}


@pytest.mark.parametrize("patch", [4, 7])
def test_a_picture_among_several_is_laid_out_as_the_model_packs_it(patch):
    features = torch.rand(1, (24 // patch) ** 2, 3)
    cut = Padded((50, 70), Square(24, patch))
    assert torch.equal(cut.lay(features), packed(config_of(24, patch), features, (50, 70), "anyres_max_9"))
    assert cut.layout().tokens == len(cut.lay(features))


@pytest.mark.parametrize(("side", "patch"), [(24, 4), (24, 7), (36, 4)])
def test_a_video_is_laid_out_as_the_model_pools_it(side, patch):
    features = torch.rand(3, (side // patch) ** 2, 2)
    cut = Pooled(3, Square(side, patch))
    pooled = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config_of(side, patch)), features).flatten(0, 1)
    found = cut.lay(features)
    assert torch.equal(found[:-1], pooled)
    assert not found[-1].any()
    assert cut.layout().tokens == len(found)


@pytest.mark.parametrize("ahead", [1, 0, -1])
def test_a_picture_that_is_one_square_stays_as_the_tower_saw_it(ahead):
    cut = Whole(Square(12, 4), ahead, cropped=False)
    seen = torch.rand(1, 9 + ahead, 2)
    assert torch.equal(cut.lay(seen), seen[0])
    assert cut.layout().tokens == 9 + ahead
    assert torch.isnan(cut.layout().cells).any(1).sum() == max(ahead, 0)
