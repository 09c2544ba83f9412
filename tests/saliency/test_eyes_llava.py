"""What the eyes of the LLaVAs see: class tokens, crops, newlines and videos, against plain loops."""

from __future__ import annotations

import pytest
import torch
from kit import eyes_oracle as oracle
from kit import tiny
from kit.gazing import generate, logits
from kit.llava_eyes import (
    ROWS,
    SIDE,
    SOURCES,
    check_state,
    each,
    every,
    expected_tokens,
    fit_placeholders,
    make_model,
    make_prompt,
    record_state,
    steer,
    tower_scores,
    tower_weights,
)
from kit.tiny_encoders import PLACEHOLDER, VIDEO, make_encoder_config
from kit.versions import cache_of
from transformers import LlavaConfig, LlavaForConditionalGeneration

import hf_steer
from hf_steer import ConfigError, SaliencyError, patch_model, unpatch_model


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
