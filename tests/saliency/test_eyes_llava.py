"""The eyes of the LLaVAs: class tokens, crops, newlines and videos, in every kind of call."""

from __future__ import annotations

import copy
import gc
import math
import threading

import peft
import pytest
import torch
from kit import eyes_oracle as oracle
from kit import tiny
from kit.gazing import TOLERANCE, generate, logits, real_logits
from kit.tiny_encoders import PLACEHOLDER, VIDEO, make_encoder_config
from kit.versions import cache_of, cached
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration, LlavaOnevisionForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_steer
from hf_steer import (
    AttentionConfig,
    ConfigError,
    Saliency,
    SaliencyConfig,
    SaliencyError,
    SteerConfig,
    patch_model,
    unpatch_model,
)
from hf_steer.ground.arguments import Given
from hf_steer.patching.gaze.arrange import read_arrangements
from hf_steer.saliency import EyeRecord, current_recorder

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


@every
@pytest.mark.parametrize("source", SOURCES)
def test_scores_equal_plain_loops_over_the_towers_attention(variant, implementation, source):
    """Several pictures, padded rows; newlines and class tokens are silent."""
    model = patch_model(make_model(variant, implementation), steer(source, normalize="none"))
    inputs = make_prompt(variant, ROWS)
    used = (0, 1, 2) if variant == "onevision" else (0, 1)
    blocks = used if source == "vision_rollout" else used[-1:]
    (weights,) = tower_weights(model, inputs)
    expected = expected_tokens(variant, ROWS, tower_scores(weights, source, blocks))
    check_state(record_state(model, inputs), inputs, expected)
    spoken = torch.tensor([value for row in expected for picture in row for value in picture if value is not None])
    assert spoken.std() > 0.01
    silent = sum(value is None for row in expected for picture in row for value in picture)
    assert silent == {"clip": 0, "clip-full": 3, "siglip": 0, "onevision": 3 + 6 + 6}[variant]


@each
def test_negative_blocks_count_from_the_last_that_is_read_and_later_ones_are_refused(variant):
    """LLaVA reads the output of the last block but one; OneVision that of the last."""
    used = 3 if variant == "onevision" else 2
    inputs = make_prompt(variant, ROWS)
    states = {}
    for blocks in ((-1,), (used - 1,), (-used,), (0,), (0, -1), "all", tuple(range(used))):
        model = patch_model(make_model(variant), steer(blocks=blocks, normalize="none"))
        states[blocks] = record_state(model, inputs).scores.values
    assert torch.equal(states[-1,], states[used - 1,])
    assert torch.equal(states[-used,], states[0,])
    assert torch.equal(states["all"], states[tuple(range(used))])
    torch.testing.assert_close(states[0, -1], (states[0,] + states[-1,]) / 2)
    assert not torch.allclose(states[0,], states[-1,])
    for block in (used, -used - 1):
        message = rf"vision blocks \[{block}\] are not there; the tower has {used} whose output the model reads, 0 to {used - 1}"
        with pytest.raises(ConfigError, match=message):
            patch_model(make_model(variant), steer(blocks=(0, block)))


def test_the_blocks_follow_vision_feature_layer():
    for chosen, used in ((-1, 3), (1, 1), ([-2, 1], 2), (-4, 0)):
        model = make_model("siglip", vision_feature_layer=chosen)
        if used:
            with pytest.raises(ConfigError, match=f"the tower has {used} whose output the model reads, 0 to {used - 1}"):
                patch_model(model, steer(blocks=(9,)))
        else:
            with pytest.raises(ConfigError, match="the tower has 0 whose output the model reads, since vision_feature_layer"):
                patch_model(model, steer("vision_rollout"))


ANYRES = [
    ([[2, (8, 24), 3]], False, 9),
    ([[(24, 9), 1, (36, 36), 2], [3, (12, 24)]], False, 9),
    ([[2, (36, 36), 3], [(20, 24), 1]], False, 2),
    ([[2, (8, 24), 1, (36, 36), 3], [4, (20, 24)]], True, 9),
    ([[2, (12, 24), 3], [4], [(24, 12), 1, (12, 24), 1, (24, 9)]], True, 9),
]


@pytest.mark.parametrize(("rows", "several", "most"), ANYRES)
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_anyres_pictures_land_where_their_crops_lie(rows, several, most, how):
    """Padding cut away, too many crops interpolated, bases alone where a row has several pictures."""
    model = make_model("onevision", vision_aspect_ratio=f"anyres_max_{most}")
    with torch.no_grad():
        inputs = make_prompt("onevision", rows, several=several)
        if most != 9:
            inputs = fit_placeholders(model, inputs, rows)
        patch_model(model, steer(normalize="none", blocks=(0,)))
        state = record_state(model, inputs)
        if how == "generate":
            out = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
            assert torch.equal(cache_of(out).hf_steer_state.scores.values, state.scores.values)
            state = cache_of(out).hf_steer_state
        (weights,) = tower_weights(model, inputs)
    expected = expected_tokens("onevision", rows, tower_scores(weights, "vision_attention", (0,)), several=several, most=most)
    check_state(state, inputs, expected)


def fit_placeholders(model, inputs, rows):
    """The prompt again with as many placeholders as this model makes of each picture."""
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True).pooler_output
    counts = iter([len(picture) for picture in features])
    parts = [[[7] * item if isinstance(item, int) else [PLACEHOLDER] * next(counts) for item in row] for row in rows]
    ids = [[token for part in row for token in part] for row in parts]
    return {**inputs, **tiny.pad_rows(ids, padding="left")}


@pytest.mark.parametrize("implementation", tiny.IMPLEMENTATIONS)
@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize("source", SOURCES)
def test_videos_are_pooled_and_normalised_frame_by_frame(implementation, how, source):
    model = patch_model(make_model("onevision", implementation), steer(source, normalize="none", blocks=(0, 1)))
    rows = [[3, (12, 24), 2, ("video", 2), 1], [4, ("video", 2)]]
    inputs = make_prompt("onevision", rows)
    if how == "forward":
        state = record_state(model, inputs)
    else:
        out = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        state = cache_of(out).hf_steer_state
    images, videos = tower_weights(model, inputs)
    crops = tower_scores(images, source, (0, 1))
    frames = tower_scores(videos, source, (0, 1))
    picture = oracle.anyres(crops, SIDE, (1, 2), (12, 24), 9)
    for row in range(2):
        tokens = oracle.pooled(frames[2 * row : 2 * row + 2], SIDE)
        places = (inputs["input_ids"][row] == VIDEO).nonzero().flatten()
        first = 1 - row  # after the picture's group
        assert state.scores.group[row, places].tolist() == [first] * 4 + [first + 1] * 4 + [-1]
        got = state.scores.values[row, places].double()
        torch.testing.assert_close(got, torch.tensor([value or 0.0 for value in tokens]).double(), rtol=1e-4, atol=1e-6)
    places = (inputs["input_ids"][0] == PLACEHOLDER).nonzero().flatten()
    got = state.scores.values[0, places].double()
    torch.testing.assert_close(got, torch.tensor([value or 0.0 for value in picture]).double(), rtol=1e-4, atol=1e-6)


@every
@pytest.mark.parametrize("source", SOURCES)
def test_strength_zero_and_disabled_are_bit_equal_and_unpatching_restores(variant, implementation, source):
    model = make_model(variant, implementation)
    inputs = make_prompt(variant, ROWS)
    plain, attributes = logits(model, inputs), [set(vars(module)) for module in model.modules()]
    patch_model(model, steer(source))
    steered = logits(model, inputs)
    assert (steered[0] - plain[0]).abs().max() > 0.1
    torch.testing.assert_close(
        real_logits(steered, inputs)[-len(ROWS[2]) :], steered[2, -len(ROWS[2]) :], rtol=0, atol=0
    )
    keep = inputs["attention_mask"][1].bool()
    torch.testing.assert_close(steered[1][keep], plain[1][keep], **TOLERANCE)  # no picture there
    with hf_steer.disable_steering(model):
        assert torch.equal(logits(model, inputs), plain)
    unpatch_model(model)
    assert torch.equal(logits(model, inputs), plain)
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.vision_tower.children())
    patch_model(model, steer(source, strength=0.0))
    assert torch.equal(logits(model, inputs), plain)


@every
@pytest.mark.parametrize(
    "call",
    [
        {}, {"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 5}, {"prefill_chunk_size": 1},
        {"cache_implementation": "static"},
    ],
    ids=str,
)  # fmt: skip
def test_generation_of_any_kind_sees_what_a_forward_pass_sees(variant, implementation, call):
    """`generate` encodes before its first pass; the first new token comes out of the same steered prompt."""
    model = patch_model(make_model(variant, implementation), steer())
    inputs = make_prompt(variant, ROWS)
    first = logits(model, inputs)[:, -1]
    torch.manual_seed(0)
    out = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True, **call
    )
    repeated = first.repeat_interleave(call.get("num_beams", 1), 0)
    torch.testing.assert_close(out.logits[0], repeated, **TOLERANCE)
    if call.keys() <= {"use_cache", "prefill_chunk_size", "cache_implementation"}:
        sequences, steps = generate(model, inputs, max_new_tokens=3)
        assert torch.equal(out.sequences, sequences)
        torch.testing.assert_close(torch.stack(out.logits, 1), steps, **TOLERANCE)
    with hf_steer.disable_steering(model):
        assert (logits(model, inputs)[0, -1] - first[0]).abs().max() > 0.05


@each
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_rows_equal_their_unpadded_selves(variant, padding):
    model = patch_model(make_model(variant), steer())
    inputs = make_prompt(variant, ROWS, padding=padding)
    batched = logits(model, inputs)
    first = 0
    for row, items in enumerate(ROWS):
        keep = inputs["attention_mask"][row].bool()
        alone = {name: inputs[name][row : row + 1][:, keep] for name in ("input_ids", "attention_mask")}
        count = sum(isinstance(item, tuple) for item in items)
        for name in {"pixel_values", "image_sizes"} & inputs.keys() if count else ():
            alone[name] = inputs[name][first : first + count]
        first += count
        torch.testing.assert_close(batched[row][keep], logits(model, alone)[0], **TOLERANCE)


@each
def test_encoder_outputs_that_the_caller_computed_keep_their_saliency(variant):
    model = patch_model(make_model(variant), steer())
    inputs = make_prompt(variant, ROWS)
    sizes = {name: inputs[name] for name in ("image_sizes",) if name in inputs}
    expected, tokens = logits(model, inputs), generate(model, inputs)[1]
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}

    def encode():
        return {"image": model.get_image_features(inputs["pixel_values"], **sizes, return_dict=True)}

    with torch.no_grad():
        torch.testing.assert_close(logits(model, without, mm_encoder_outputs=encode()), expected)
        torch.testing.assert_close(generate(model, dict(without, mm_encoder_outputs=encode()))[1], tokens)
        with hf_steer.disable_steering(model):
            foreign = encode()
    with pytest.raises(SaliencyError, match="the vision tower of the patched model did not compute them"):
        logits(model, without, mm_encoder_outputs=foreign)
    if sizes:
        bare = {name: value for name, value in without.items() if name != "image_sizes"}
        with torch.no_grad(), pytest.raises(SaliencyError, match=r"image_sizes did not come with mm_encoder_outputs"):
            model(**bare, mm_encoder_outputs=encode())


def test_video_features_that_the_caller_computed_keep_their_saliency():
    model = patch_model(make_model("onevision"), steer())
    inputs = make_prompt("onevision", [[3, ("video", 3), 2], [1, ("video", 3), 4]])
    expected = logits(model, inputs)
    without = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
    with torch.no_grad():
        encoded = {"video": model.get_video_features(inputs["pixel_values_videos"], return_dict=True)}
    torch.testing.assert_close(logits(model, without, mm_encoder_outputs=encoded), expected)


@each
def test_a_token_count_that_does_not_match_is_refused(variant):
    model = patch_model(make_model(variant), steer())
    inputs = make_prompt(variant, [[3, (12, 24), 4]])
    inputs["input_ids"][0, 3] = 5
    count = (inputs["input_ids"] == PLACEHOLDER).sum().item()
    for call in (logits, generate):
        with pytest.raises(SaliencyError, match=rf"image token count does not match: .* \[{count}\] image tokens.*\[{count + 1}\]"):
            call(model, inputs)


def test_sizes_and_counts_that_disagree_are_refused():
    model = patch_model(make_model("onevision"), steer())
    inputs = make_prompt("onevision", [[2, (8, 24), 1, (36, 36), 3]], several=True)
    with pytest.raises(SaliencyError, match="batch_num_images counts 3 pictures, image_sizes has 2. Pass both as"):
        logits(model, {**inputs, "batch_num_images": torch.tensor([1, 2])})


@each
def test_token_scores_of_the_user_need_no_place_in_the_picture(variant):
    """Also where the caller encoded the pictures while the model's own eyes were watched."""
    model = patch_model(make_model(variant), steer())
    inputs = make_prompt(variant, ROWS)
    sizes = {name: inputs[name] for name in ("image_sizes",) if name in inputs}
    said = Saliency.from_tokens(torch.randn(inputs["input_ids"].shape))
    expected = logits(model, inputs, said)
    assert (expected - logits(model, inputs))[0].abs().max() > 0.05
    torch.testing.assert_close(generate(model, inputs, said)[1][:, 0], expected[:, -1], **TOLERANCE)
    with torch.no_grad():
        encoded = {"image": model.get_image_features(inputs["pixel_values"], **sizes, return_dict=True)}
    without = {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_sizes")}
    torch.testing.assert_close(logits(model, without, said, mm_encoder_outputs=encoded), expected)


def test_a_tower_that_sees_other_pictures_than_the_prompt_asks_for_is_refused():
    model = patch_model(make_model("onevision"), steer())
    inputs = make_prompt("onevision", [[3, (12, 24), 4]])
    with torch.no_grad():
        other = model.model.vision_tower(inputs["pixel_values"][0, :2], return_dict=True)
        encoded = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
    encoded.hf_steer = other.hf_steer
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with pytest.raises(SaliencyError, match="image count does not match: .* for 3 pictures, crops and frames included.* saw 2"):
        logits(model, without, mm_encoder_outputs={"image": encoded})


@each
def test_a_second_turn_brings_its_own_picture(variant):
    """On the cache of the first; the same as both pictures at once, when each is normalised by itself."""
    model = patch_model(make_model(variant), steer())
    rows = [[3, (12, 24), 2, (12, 24), 4]]
    whole = make_prompt(variant, rows)
    cut = 3 + picture_tokens(variant, (12, 24))
    cache = DynamicCache(config=model.config.get_text_config())
    names = {"pixel_values", "image_sizes"} & whole.keys()
    turns = [
        {"input_ids": whole["input_ids"][:, part], **{name: whole[name][index : index + 1] for name in names}}
        for index, part in enumerate((slice(cut), slice(cut, None)))
    ]
    logits(model, turns[0], **cached(cache))
    second = logits(model, turns[1], **cached(cache))
    torch.testing.assert_close(second, logits(model, whole)[:, cut:], **TOLERANCE)
    repeated = {**whole, **{name: whole[name][1:] for name in names}}  # generate's convention: all ids, new pictures alone
    cache = DynamicCache(config=model.config.get_text_config())
    logits(model, turns[0], **cached(cache))
    out = generate(model, {**repeated, **cached(cache)}, max_new_tokens=2)[1]
    torch.testing.assert_close(out[:, 0], second[:, -1], **TOLERANCE)


@each
def test_threads_copies_and_saved_models_look_alike(variant, tmp_path):
    model = patch_model(make_model(variant), steer())
    prompts = [make_prompt(variant, ROWS, seed=seed) for seed in range(4)]
    in_turn = [generate(model, inputs)[1] for inputs in prompts]
    assert not torch.equal(in_turn[0], in_turn[1])
    at_once = [None] * len(prompts)

    def work(index):
        at_once[index] = generate(model, prompts[index])[1]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone, together) for alone, together in zip(in_turn, at_once, strict=True))
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    unpatch_model(model)
    assert torch.equal(generate(twin, prompts[0])[1], in_turn[0])
    assert torch.equal(generate(hf_steer.from_pretrained(tmp_path).eval(), prompts[0])[1], in_turn[0])


@pytest.mark.parametrize("implementation", tiny.IMPLEMENTATIONS)
def test_two_models_of_one_family_run_the_functions_of_their_own_towers(implementation):
    models = {name: patch_model(make_model(name, implementation), steer()) for name in ("clip", "siglip")}
    inputs = make_prompt("clip", ROWS)
    first = {name: logits(model, inputs) for name, model in models.items()}
    for name, model in reversed(models.items()):
        assert torch.equal(logits(model, inputs), first[name])
        attention = model.hf_steer.plan.eyes[0].module
        wrapped = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation].keywords["function"].keywords["inner"]
        if implementation == "eager":
            assert wrapped.__module__ == type(attention).__module__
        else:
            assert wrapped is ALL_ATTENTION_FUNCTIONS["sdpa"]


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_what_a_call_says_about_its_pictures_is_heeded_as_far_as_the_model_heeds_it(how):
    """`vision_aspect_ratio` reaches the pictures from `generate` alone; a forward pass of OneVision drops it."""
    model = make_model("onevision")
    rows, ratio = [[2, (36, 36), 3]], "anyres_max_2"
    inputs = make_prompt("onevision", rows)
    with torch.no_grad():
        features = model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], vision_aspect_ratio=ratio, return_dict=True
        ).pooler_output
    assert len(features[0]) < picture_tokens("onevision", (36, 36))
    patch_model(model, steer())
    if how == "forward":
        assert torch.equal(logits(model, inputs, vision_aspect_ratio=ratio), logits(model, inputs))
    else:
        ids = [[2, 3, *[PLACEHOLDER] * len(features[0]), 4]]
        generate(model, {**inputs, **tiny.pad_rows(ids, padding="left"), "vision_aspect_ratio": ratio})
    clip = patch_model(make_model("clip"), steer())
    inputs, full = make_prompt("clip-full", ROWS), {"vision_feature_select_strategy": "full"}
    expected = patch_model(make_model("clip-full"), steer())
    if how == "forward":
        assert torch.equal(logits(clip, inputs, **full), logits(expected, inputs))
    else:
        assert torch.equal(generate(clip, {**inputs, **full})[1], generate(expected, inputs)[1])


@pytest.mark.parametrize(("variant", "rows"), [("clip-full", ROWS), ("onevision", ROWS), ("onevision", [[("video", 2), 3]])])
def test_pictures_that_were_encoded_once_per_beam_are_arranged_as_often(variant, rows):
    """As transformers repeated them up to 5.17: each picture, with its crops, several times in a row."""
    model = patch_model(make_model(variant), steer())
    inputs = make_prompt(variant, rows)
    modality = "image" if rows is ROWS else "video"
    arrangement = read_arrangements(Given(inputs), model.hf_steer.plan.anatomy, whole=True)[modality]
    positions = SIDE**2 + (variant == "clip-full")
    crops = torch.rand(sum(arrangement.takes), positions)

    def record(pictures):
        return EyeRecord(pictures.flatten(), torch.arange(len(pictures)).repeat_interleave(positions))

    once = arrangement.arrange(record(crops))
    twice = arrangement.arrange(record(torch.cat([part.repeat(2, 1) for part in crops.split(arrangement.takes)])))
    counts = arrangement.counts()
    assert len(once.scores) == sum(counts)
    for name in ("scores", "group"):
        single, double = getattr(once, name).split(counts), getattr(twice, name).split([2 * count for count in counts])
        for picture, pair in zip(single, double, strict=True):
            if name == "scores":
                assert torch.equal(torch.cat([picture, picture]), pair)
            else:
                assert torch.equal(pair < 0, torch.cat([picture, picture]) < 0)
                first, second = (half[half >= 0].unique() for half in pair.chunk(2))
                assert len(first) == len(second) == len(picture[picture >= 0].unique())
                assert first.max() < second.min()


@each
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_the_tower_runs_once_and_its_output_stays_bit_equal(variant, how):
    inputs = make_prompt(variant, ROWS)
    seen = {}
    for patched in (False, True):
        model = make_model(variant)
        if patched:
            patch_model(model, steer("vision_rollout"))
        outputs, projected = [], []
        model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args, outputs=outputs: outputs.append(args[0]))
        for name, module in model.model.vision_tower.named_modules():
            if name.endswith("q_proj"):
                module.register_forward_hook(lambda *_, projected=projected: projected.append("q"))
        logits(model, inputs) if how == "forward" else model.generate(**inputs, max_new_tokens=3, do_sample=False)
        seen[patched] = outputs, len(projected)
    assert len(seen[True][0]) == 1
    assert seen[True][1] == seen[False][1] == 3
    assert torch.equal(seen[True][0][0], seen[False][0][0])


@each
@pytest.mark.parametrize("source", SOURCES)
def test_gradient_checkpointing_reads_nothing_twice(variant, source, monkeypatch):
    from hf_steer.saliency import eyes

    inputs = make_prompt(variant, ROWS)
    gradients = []
    for recompute in (False, True):
        model = make_model(variant).train()
        if recompute:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        patch_model(model, steer(source, blocks=(0,)))
        read, real = [], eyes.attention_received
        with monkeypatch.context() as patched:
            patched.setattr(eyes, "attention_received", lambda *args, read=read, real=real: read.append(args) or real(*args))
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert len(read) == (3 if variant != "onevision" else 3 + 3 + 5)
        assert eyes.current_recorder() is None
        gradients.append(model.model.vision_tower.get_submodule("encoder.layers.0.self_attn.q_proj").weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert gradients[0].abs().max() > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@each
def test_peft_and_the_base_model_alone_are_steered_too(variant):
    model = patch_model(make_model(variant), steer())
    inputs = make_prompt(variant, ROWS)
    expected = logits(model, inputs)
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), expected)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))  # its B starts at zero
    torch.testing.assert_close(logits(adapted, inputs), expected)
    torch.testing.assert_close(generate(adapted, inputs)[1][:, 0], expected[:, -1], **TOLERANCE)


@each
def test_an_interrupted_pass_leaves_no_trace(variant):
    """In the tower, and between tower and decoder: the next call sees its own pictures, and nothing watches on or is kept."""

    model = patch_model(make_model(variant), steer())
    inputs, other = make_prompt(variant, ROWS), make_prompt(variant, ROWS, seed=5)
    expected, tokens = logits(model, inputs), generate(model, inputs)[1]
    for module in (model.model.vision_tower.get_submodule("encoder.layers.1.mlp"), model.model.multi_modal_projector):

        def fail(*_):
            raise MemoryError("injected")

        hook = module.register_forward_pre_hook(fail)
        for call in (logits, generate):
            with pytest.raises(MemoryError, match="injected"):
                call(model, other)
            assert current_recorder() is None
        hook.remove()
        assert torch.equal(generate(model, inputs)[1], tokens)
        assert torch.equal(logits(model, inputs), expected)
    gc.collect()
    assert not [kept for kept in gc.get_objects() if isinstance(kept, EyeRecord)]


@pytest.mark.parametrize("source", SOURCES)
def test_two_outlier_patches_of_a_real_tower_do_not_take_the_bias(source):
    """Two of 256 patches that all queries attend to, in an otherwise even tower, as high-norm patches of trained towers are."""
    vision = {**make_encoder_config("llava_onevision").vision_config.to_dict(), "vision_use_head": False}
    vision = LlavaConfig(vision_config={**vision, "hidden_size": 128, "image_size": 64}).vision_config
    model = make_model("siglip", vision_config=vision)
    tower, places = model.model.vision_tower, torch.tensor([37, 200])
    sink = torch.randn(128)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[places] += 100 * sink
        for block in tower.encoder.layers:
            norm, attention = block.layer_norm1, block.self_attn
            attention.q_proj.weight *= 0.2
            attention.q_proj.bias += 0.25 * attention.k_proj(torch.nn.functional.layer_norm(sink, (128,), norm.weight, norm.bias))
    inputs = {"input_ids": torch.tensor([[5, *[PLACEHOLDER] * 256, 6]]), "pixel_values": torch.randn(1, 3, 64, 64)}
    scores = {}
    for normalize in ("none", "zscore"):
        patch_model(model, steer(source, normalize=normalize))
        scores[normalize] = record_state(model, inputs).scores.values[0, 1:257]
        unpatch_model(model)
    raw = scores["none"]
    assert (raw[places] / raw.median()).min() > 30
    plain = ((raw - raw.mean()) / raw.std(unbiased=False)).clamp(-3, 3)
    for part in (torch.abs, torch.relu):  # of the whole bias, and of what draws the gaze
        too_much, share = (float(part(values)[places].sum() / part(values).sum()) for values in (plain, scores["zscore"]))
        assert too_much > 0.12 > 0.10 >= share > 0


def test_a_tower_that_is_not_known_is_refused_for_its_eyes_alone():
    vision = {**make_encoder_config("llava").vision_config.to_dict(), "model_type": "mlcd_vision_model", "num_key_value_groups": 1}
    text = make_encoder_config("llava").text_config.to_dict()
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=PLACEHOLDER)
    model = LlavaForConditionalGeneration._from_config(config)
    with pytest.raises(ConfigError, match=r"needs a vision tower, which 'llava' lacks.*llava.*if it is CLIP or SigLIP"):
        patch_model(model, steer())
    assert hf_steer.get_steer_status(patch_model(model, steer(None))).patched


@each
def test_an_implementation_of_the_tower_that_cannot_be_wrapped_is_refused(variant):
    model = make_model(variant)
    model.get_encoder("image").config._attn_implementation_internal = "my_own"
    with pytest.raises(hf_steer.PatchError, match="the vision tower runs attention implementation 'my_own'"):
        patch_model(model, steer())
    assert not hf_steer.get_steer_status(model).patched
    patch_model(model, steer(None))


@each
@pytest.mark.usefixtures("flex_without_a_compiler")
def test_a_tower_that_runs_flex_attention_sees_what_it_sees_with_sdpa(variant):
    found = []
    for implementation in ("sdpa", "flex_attention"):
        model = make_model(variant)
        model.set_attn_implementation({"vision_config": implementation})
        inputs = make_prompt(variant, ROWS)
        found.append(record_state(patch_model(model, steer(normalize="none")), inputs).scores.values)
    torch.testing.assert_close(found[1], found[0])
    assert found[0].std() > 0.01


@each
def test_inspect_finds_the_tower(variant, tmp_path):
    from hf_steer.analysis.inspection import inspect_model

    model = make_model(variant)
    model.save_pretrained(tmp_path)
    report = inspect_model(tmp_path)
    assert report.can_be_patched
    assert report.anatomy["vision tower"] == "model.vision_tower"
    used = 3 if variant == "onevision" else 2
    assert report.anatomy["vision blocks"].startswith(f"{used}: model.vision_tower.")
    assert report.anatomy["vision tokens"]["image"] == PLACEHOLDER
    assert f"vision blocks    {used}: " in str(report)
