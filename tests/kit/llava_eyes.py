"""Tiny LLaVAs and prompts for their eyes, and what these see, in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from kit import eyes_oracle as oracle
from kit import tiny
from kit.tiny_encoders import PLACEHOLDER, VIDEO, make_encoder_config
from kit.versions import cache_of
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaOnevisionForConditionalGeneration

import hf_steer
from hf_steer import AttentionConfig, SaliencyConfig, SteerConfig

SIDE = 3
PIXELS = 12
PINPOINTS = [[12, 24], [24, 12], [24, 24], [36, 36]]
VARIANTS = ("clip", "clip-full", "siglip", "onevision")
"""CLIP without and with its class token, SigLIP, and SigLIP with base, crops and newlines."""
EVERY = [(variant, implementation) for variant in VARIANTS for implementation in tiny.IMPLEMENTATIONS]
every = pytest.mark.parametrize(("variant", "implementation"), EVERY)
each = pytest.mark.parametrize("variant", VARIANTS)
SOURCES = ("vision_attention", "vision_rollout")


def make_model(variant, implementation="sdpa", **changes):
    torch.manual_seed(0)
    config = make_encoder_config("llava_onevision" if variant == "onevision" else "llava")
    if variant == "onevision":
        config.image_grid_pinpoints = PINPOINTS
    elif variant == "clip-full":
        config.vision_feature_select_strategy = "full"
    elif variant == "siglip":
        vision = {**make_encoder_config("llava_onevision").vision_config.to_dict(), "vision_use_head": False}
        config = LlavaConfig(
            vision_config=vision, text_config=config.text_config.to_dict(), image_token_index=PLACEHOLDER,
            vision_feature_select_strategy="full",
        )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    kind = LlavaOnevisionForConditionalGeneration if variant == "onevision" else LlavaForConditionalGeneration
    model = kind._from_config(config, attn_implementation=implementation)
    tiny.spread(model, 0)
    tiny.settle_generation(model)
    return model.eval()


def steer(source="vision_attention", *, strength=2.0, heads=None, **saliency):
    saliency = SaliencyConfig(source=source, **saliency)
    return SteerConfig(attention=AttentionConfig(heads=heads or {1: (0, 3), -1: "all"}, strength=strength, saliency=saliency))


def picture_tokens(variant, item, alone=True):
    """How many tokens a picture `(height, width)` in pixels, or a video of so many frames, becomes."""
    if isinstance(item, int):
        return item * 4 + 1
    if variant != "onevision":
        return SIDE**2 + (variant == "clip-full")
    tiles = tiles_of(item) if alone else (0, 0)
    crops = [[0.0] * SIDE**2] * (1 + tiles[0] * tiles[1])
    return len(oracle.anyres(crops, SIDE, tiles, item, 9))


def tiles_of(size):
    """The pinpoint that loses least, worked out by hand for the sizes that are used here."""
    return {(12, 24): (1, 2), (24, 12): (2, 1), (8, 24): (1, 2), (20, 24): (2, 2), (36, 36): (3, 3), (24, 9): (2, 1)}[size]


def make_prompt(variant, rows, *, padding="left", several=False, seed=1):
    """Rows of text lengths, pictures `(height, width)`, and videos `("video", frames)`; `several`: rows may hold several
    pictures, which then have no crops."""
    generator = torch.Generator().manual_seed(seed)
    ids, sizes, frames, per_row = [], [], [], []
    for row in rows:
        tokens = []
        pictures = [item for item in row if isinstance(item, tuple) and item[0] != "video"]
        per_row += [len(pictures)] if pictures else []
        for item in row:
            if isinstance(item, int):
                tokens += torch.randint(2, 80, (item,), generator=generator).tolist()
            elif item[0] == "video":
                tokens += [VIDEO] * picture_tokens(variant, item[1])
                frames.append(item[1])
            else:
                alone = not several or len(pictures) == 1
                tokens += [PLACEHOLDER] * picture_tokens(variant, item, alone)
                sizes.append((item, alone))
        ids.append(tokens)
    inputs = tiny.pad_rows(ids, padding=padding)
    if sizes and variant != "onevision":
        inputs["pixel_values"] = torch.randn(len(sizes), 3, PIXELS, PIXELS, generator=generator)
    elif sizes:
        takes = [1 + math.prod(tiles_of(size)) if alone else 1 for size, alone in sizes]
        inputs["pixel_values"] = torch.zeros(len(sizes), max(takes), 3, PIXELS, PIXELS)
        for pixels, count in zip(inputs["pixel_values"], takes, strict=True):
            pixels[:count] = torch.randn(count, 3, PIXELS, PIXELS, generator=generator)
        inputs["image_sizes"] = torch.tensor([size for size, _ in sizes])
        if several:
            inputs["batch_num_images"] = torch.tensor(per_row)
    if frames:
        inputs["pixel_values_videos"] = torch.randn(len(frames), frames[0], 3, PIXELS, PIXELS, generator=generator)
    return inputs


ROWS = [[3, (12, 24), 4, (24, 12), 5], [6], [2, (20, 24), 3]]


def record_state(model, inputs):
    with torch.no_grad():
        return cache_of(model(**inputs, use_cache=True)).hf_steer_state


def tower_weights(model, inputs):
    """For each used block, the attention weights of all pictures that the tower saw, by loops over what its projections make."""
    made = {}
    vision = model.model.vision_tower
    blocks = next(module for name, module in vision.named_modules() if name.endswith("encoder.layers"))
    hooks = []
    for number, block in enumerate(blocks):
        for name in ("q_proj", "k_proj"):
            def keep(module, args, output, place=(number, name)):
                made.setdefault(place, []).append(output)

            hooks.append(getattr(block.self_attn, name).register_forward_hook(keep))
    with hf_steer.disable_steering(model), torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    calls = len(made[0, "q_proj"])
    weights = []
    for call in range(calls):
        per_block = []
        for number in range(len(blocks)):
            query, key = (
                made[number, name][call].unflatten(-1, (2, -1)).transpose(1, 2) for name in ("q_proj", "k_proj")
            )
            per_block.append([oracle.attention(*picture, 8**-0.5) for picture in zip(query, key, strict=True)])
        weights.append(per_block)
    return weights


def tower_scores(per_block, source, blocks):
    """Scores of every picture that the tower saw in one call: `[picture][position]`."""
    score = oracle.received if source == "vision_attention" else oracle.rollout
    pictures = zip(*(per_block[block] for block in blocks), strict=True)
    return [score([oracle.block_diagonal([segment]) for segment in picture]).tolist() for picture in pictures]


def expected_tokens(variant, rows, scores, *, several=False, most=9):
    """Per row, the scores of its placeholders in their order, None where nothing is said."""
    scores = iter(scores)
    expected = []
    for row in rows:
        pictures = [item for item in row if isinstance(item, tuple)]
        tokens = []
        for size in pictures:
            if variant != "onevision":
                picture = next(scores)
                tokens.append({"clip": picture[1:], "clip-full": [None, *picture[1:]], "siglip": picture}[variant])
                continue
            tiles = tiles_of(size) if not several or len(pictures) == 1 else (0, 0)
            crops = [next(scores) for _ in range(1 + math.prod(tiles))]
            tokens.append(oracle.anyres(crops, SIDE, tiles, size, most))
        expected.append(tokens)
    assert next(scores, None) is None
    return expected


def check_state(state, inputs, expected, placeholder=PLACEHOLDER):
    """Scores, silence, and one group per picture."""
    for row, pictures in enumerate(expected):
        places = (inputs["input_ids"][row] == placeholder).nonzero().flatten()
        values = [value for picture in pictures for value in picture]
        groups = [number if value is not None else -1 for number, picture in enumerate(pictures) for value in picture]
        assert state.scores.group[row, places].tolist() == groups
        got = state.scores.values[row, places].double()
        wanted = torch.tensor([value or 0.0 for value in values], dtype=torch.float64)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        elsewhere = inputs["input_ids"][row] != placeholder
        assert (state.scores.group[row][elsewhere] == -1).all()
        assert not state.scores.values[row][elsewhere].any()


def fit_placeholders(model, inputs, rows):
    """The prompt again with as many placeholders as this model makes of each picture."""
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True).pooler_output
    counts = iter([len(picture) for picture in features])
    parts = [[[7] * item if isinstance(item, int) else [PLACEHOLDER] * next(counts) for item in row] for row in rows]
    ids = [[token for part in row for token in part] for row in parts]
    return {**inputs, **tiny.pad_rows(ids, padding="left")}
