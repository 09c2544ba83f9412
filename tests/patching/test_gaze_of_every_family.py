"""Boxes and seconds on every family that is shown or told something, from the user's words to the logits.

Expected scores are worked out by hand for the tiny geometries of `tiny_encoders`, and given to the model token by token.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from kit.caches import cache_for
from kit.gazing import TOLERANCE, generate, logits, looking
from kit.tiny import IMPLEMENTATIONS, pad_rows, settle_generation, spread
from kit.tiny_encoders import PLACEHOLDER, VIDEO, make_encoder_config, make_encoder_inputs, make_encoder_model
from kit.versions import ENCODES_FIRST, cache_of, cached, repeats_pictures

from hf_steer import AttentionConfig, Saliency, SaliencyConfig, SaliencyError, SteerConfig, patch_model

WIDE = (24, 12)
"""Width and height of every picture here: what CLIP's processor leaves of it is x from 6 to 18."""


def told(**saliency):
    saliency = SaliencyConfig(source=None, **{"normalize": "none", "preserve_mass": False, **saliency})
    return SteerConfig(attention=AttentionConfig(heads={1: (0, 3), -1: "all"}, strength=2.0, saliency=saliency, queries="all"))


def siglip_or_pixtral(tower, implementation):
    config = make_encoder_config("llava").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
    vision |= {"model_type": "pixtral", "image_size": 24, "head_dim": 8} if tower == "pixtral" else {
        "model_type": "siglip_vision_model", "image_size": 12
    }  # fmt: skip
    config |= {"vision_config": vision, "vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    model = transformers.LlavaForConditionalGeneration._from_config(
        transformers.LlavaConfig(**config), attn_implementation=implementation
    )
    spread(model, 0)
    settle_generation(model)
    return model.eval()


def make(case, implementation="sdpa"):
    if case in ("siglip", "pixtral"):
        return siglip_or_pixtral(case, implementation)
    return make_encoder_model(case, implementation=implementation)


def inputs_for(case, padding="left"):
    """Three rows: two pictures or sounds, one, and none."""
    if case != "pixtral":
        return make_encoder_inputs("llava" if case == "siglip" else case, padding=padding)
    ids = [[5, *[PLACEHOLDER] * 18, 6, 7, *[PLACEHOLDER] * 18, 8], [9, *[PLACEHOLDER] * 8, 5], [6] * 4]
    sizes = torch.tensor([[12, 24], [12, 24], [16, 8]])
    pixels = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    return {**pad_rows(ids, padding=padding), "pixel_values": pixels, "image_sizes": sizes}


SPANS = [(0.04, 0.1), (0.13, 0.15)]
CASES = {
    # CLIP: 3 x 3 tokens of 4 x 4 pixels, from x = 6 on
    "llava": (Saliency.from_boxes((8, 0, 12, 6), WIDE), {0: 0.5, 1: 0.5, 3: 0.25, 4: 0.25}),
    # SigLIP: 3 x 3 tokens of 8 x 4 pixels
    "siglip": (Saliency.from_boxes((4, 0, 16, 6), WIDE), {0: 0.5, 1: 1, 3: 0.25, 4: 0.5}),
    # Pixtral: 3 rows of 6 tokens, 4 x 4 pixels each
    "pixtral": (Saliency.from_boxes((4, 0, 10, 6), WIDE), {1: 1, 2: 0.5, 7: 0.5, 8: 0.25}),
    # OneVision: 3 x 3 tokens of 8 x 4 pixels, then 3 rows of 6 tokens of 4 x 4 pixels and a newline
    "llava_onevision": (
        Saliency.from_boxes((4, 0, 12, 6), WIDE), {0: 0.5, 1: 0.5, 3: 0.25, 4: 0.25, 10: 1, 11: 1, 17: 0.5, 18: 0.5},
    ),
    # tokens of 40 ms
    "qwen2_audio": (Saliency.from_seconds(SPANS), {1: 1, 2: 0.5, 3: 0.5}),
    "audioflamingo3": (Saliency.from_seconds(SPANS), {1: 1, 2: 0.5, 3: 0.5}),
    # tokens of 80 ms
    "voxtral": (Saliency.from_seconds(SPANS), {0: 0.5, 1: 0.5}),
}
every = pytest.mark.parametrize(
    ("case", "implementation"), [(case, implementation) for case in CASES for implementation in IMPLEMENTATIONS]
)
PICTURES = ("llava", "siglip", "pixtral", "llava_onevision")


def of(saliency, *, row=0, index=0):
    """The same said of another picture or sound."""
    return Saliency(terms=tuple(dataclasses.replace(term, row=row, index=index) for term in saliency.terms))


def said_of_the_second_row(case):
    return Saliency.from_boxes((0, 0, 4, 8), (8, 16)) if case == "pixtral" else CASES[case][0]  # its picture is upright


def token_by_token(expected, inputs, *, row=0, index=0, placeholder=PLACEHOLDER):
    """The scores that are expected of one picture or sound, by hand: its tokens follow one another, with text before and after."""
    ids = inputs["input_ids"]
    runs, before = [], None
    for position in (ids[row] == placeholder).nonzero().flatten().tolist():
        if before is None or position != before + 1:
            runs.append(position)
        before = position
    scores = torch.zeros(ids.shape)
    for token, score in expected.items():
        scores[row, runs[index] + token] = score
    return Saliency.from_tokens(scores)


@every
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("index", [0, 1])
def test_what_is_said_steers_exactly_the_tokens_that_it_covers(case, implementation, padding, index):
    model, inputs = make(case, implementation), inputs_for(case, padding)
    said, expected = CASES[case]
    said, by_hand = of(said, index=index), token_by_token(expected, inputs, index=index)
    plain = logits(model, inputs)
    patch_model(model, told())
    steered = logits(model, inputs, said)
    torch.testing.assert_close(steered, logits(model, inputs, by_hand))
    assert (steered[0] - plain[0]).abs().max() > 0.05
    keep = inputs["attention_mask"][1:].bool()  # the other rows are as they were
    torch.testing.assert_close(steered[1:][keep], plain[1:][keep], **TOLERANCE)
    with torch.no_grad(), looking(model, said):
        state = cache_of(model(**inputs, use_cache=True)).hf_steer_state
    torch.testing.assert_close(state.scores.values, by_hand.tokens)


@every
def test_what_is_said_holds_in_generate(case, implementation):
    """Which encodes pictures before the first forward pass, and hands on neither pixels nor sizes."""
    model, inputs = patch_model(make(case, implementation), told()), inputs_for(case)
    said, expected = CASES[case]
    sequences, steps = generate(model, inputs, said)
    assert torch.equal(sequences, generate(model, inputs, token_by_token(expected, inputs))[0])
    torch.testing.assert_close(steps, generate(model, inputs, token_by_token(expected, inputs))[1])
    torch.testing.assert_close(steps[:, 0], logits(model, inputs, said)[:, -1], **TOLERANCE)
    if case not in PICTURES or not repeats_pictures(case):  # several sounds of a row go to the wrong copies even in 5.24
        inputs, said = row_of(inputs, 1), said_of_the_second_row(case)
        steps = generate(model, inputs, said)[1]
    with looking(model, said):
        several = model.generate(
            **inputs, max_new_tokens=1, do_sample=True, num_return_sequences=3, return_dict_in_generate=True, output_logits=True
        )
    torch.testing.assert_close(several.logits[0], steps[:, 0].repeat_interleave(3, 0), **TOLERANCE)


def row_of(inputs, row, owners=(0, 0, 1)):
    """One row of a batch without its padding, with the pictures or sounds that it owns."""
    keep, own = inputs["attention_mask"][row].bool(), [index for index, owner in enumerate(owners) if owner == row]
    cut = {name: inputs[name][row : row + 1][:, keep] for name in ("input_ids", "attention_mask")}
    return cut if not own else {**cut, **{name: value[own] for name, value in inputs.items() if name not in cut}}


@every
def test_beams_and_padded_rows_equal_the_row_alone(case, implementation):
    model, inputs = patch_model(make(case, implementation), told(normalize="zscore")), inputs_for(case)
    first = CASES[case][0]
    second = said_of_the_second_row(case)
    said = of(first, index=1) + of(second, row=1)
    batched = logits(model, inputs, said)
    with looking(model, said):
        beams = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
    for row, alone in ((0, of(first, index=1)), (1, of(second)), (2, Saliency())):
        own = row_of(inputs, row)
        torch.testing.assert_close(batched[row][inputs["attention_mask"][row].bool()], logits(model, own, alone)[0], **TOLERANCE)
        with looking(model, alone):
            assert torch.equal(beams[row, -4:], model.generate(**own, max_new_tokens=4, do_sample=False, num_beams=3)[0, -4:])


@pytest.mark.parametrize("case", CASES)
def test_a_later_turn_can_speak_of_an_earlier_picture_or_sound(case):
    model, inputs = patch_model(make(case), told()), inputs_for(case)
    first = {**row_of(inputs, 0)}
    later = {"input_ids": torch.tensor([[5, 6, 7]])}
    said, expected = CASES[case]
    whole = {"input_ids": torch.cat([first["input_ids"], later["input_ids"]], 1)}
    for opening in (None, Saliency.from_tokens(torch.zeros(first["input_ids"].shape))):  # told nothing, or nothing of pictures
        cache = cache_for(model)
        logits(model, first, opening, **cached(cache))
        later_logits = logits(model, later, of(said, index=1), **cached(cache))
        by_hand = cache_for(model)
        logits(model, first, opening, **cached(by_hand))
        expected_logits = logits(model, later, token_by_token(expected, whole, index=1), **cached(by_hand))
        torch.testing.assert_close(later_logits, expected_logits)
        silent = cache_for(model)
        logits(model, first, opening, **cached(silent))
        assert (later_logits - logits(model, later, Saliency(), **cached(silent))).abs().max() > 0.01


@pytest.mark.parametrize("case", PICTURES if ENCODES_FIRST else [])
def test_pictures_that_the_caller_encoded_keep_their_layout(case):
    model, inputs = patch_model(make(case), told()), inputs_for(case)
    said = CASES[case][0]
    expected, (_, steps) = logits(model, inputs, said), generate(model, inputs, said)
    sizes = {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}

    def encoded():
        with torch.no_grad():
            return {"image": model.get_image_features(inputs["pixel_values"], return_dict=True, **sizes)}

    torch.testing.assert_close(logits(model, without, said, mm_encoder_outputs=encoded()), expected)
    torch.testing.assert_close(generate(model, dict(without, mm_encoder_outputs=encoded()), said)[1], steps)
    if sizes:
        lacking = {name: value for name, value in without.items() if name != "image_sizes"}
        with pytest.raises(SaliencyError, match="image_sizes did not come with mm_encoder_outputs"):
            logits(model, lacking, said, mm_encoder_outputs=encoded())
        nothing = Saliency.from_tokens(torch.zeros(inputs["input_ids"].shape))
        logits(model, lacking, nothing, mm_encoder_outputs=encoded())  # token scores need no layout


def test_newlines_are_left_out_of_what_is_normalised():
    model = patch_model(make("llava_onevision"), told(normalize="zscore", preserve_mass=True))
    inputs = inputs_for("llava_onevision")
    with torch.no_grad(), looking(model, CASES["llava_onevision"][0]):
        scores = cache_of(model(**inputs, use_cache=True)).hf_steer_state.scores
    first = int((inputs["input_ids"][0] == PLACEHOLDER).nonzero()[0])
    newlines = [first + 9 + 7 * row + 6 for row in range(3)]
    assert (scores.group[0, newlines] == -1).all()
    assert not scores.values[0, newlines].any()
    placed = scores.values[0][scores.group[0] == 0]
    assert len(placed) == 27
    assert placed.mean().abs() < 1e-5
    assert placed.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_onevision_reads_several_pictures_and_videos_in_their_own_layouts(implementation):
    """A row with two padded pictures, a row with one in parts and a video of three frames of 2 x 2 tokens."""
    model = make("llava_onevision", implementation)
    ids = [[5, *[PLACEHOLDER] * 10, 6, *[PLACEHOLDER] * 10, 7], [8, *[PLACEHOLDER] * 30, 9, *[VIDEO] * 13, 4, 3]]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        **pad_rows(ids, padding="left"),
        "pixel_values": torch.randn(3, 3, 3, 12, 12, generator=generator), "image_sizes": torch.tensor([[12, 24]] * 3),
        "batch_num_images": torch.tensor([2, 1]),
        "pixel_values_videos": torch.randn(1, 3, 3, 12, 12, generator=generator),
    }  # fmt: skip
    patch_model(model, told())
    cases = [
        # the square of 24 x 24 pixels has the picture in its middle half: rows of 8 pixels, of which 6 lie above it
        (Saliency.from_boxes((8, 0, 16, 4), WIDE, image=1), {1: 1, 4: 0.25}, {"index": 1}),
        (of(CASES["llava_onevision"][0], row=1), CASES["llava_onevision"][1], {"row": 1}),
        # 3 patches pooled to 2 tokens of 1.5, frame by frame, and a newline
        (Saliency.from_boxes((0, 0, 18, 12), WIDE, row=1, video=0, frames=(1, 2)), {4: 1, 5: 0.5, 6: 1, 7: 0.5}, {"row": 1}),
    ]
    for number, (said, expected, place) in enumerate(cases):
        by_hand = token_by_token(expected, inputs, placeholder=VIDEO if number == 2 else PLACEHOLDER, **place)
        torch.testing.assert_close(logits(model, inputs, said), logits(model, inputs, by_hand))
        torch.testing.assert_close(generate(model, inputs, said)[1], generate(model, inputs, by_hand)[1])
        assert (logits(model, inputs, said) - logits(model, inputs, Saliency())).abs().max() > 0.02


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "tokens", "seconds"), [("voxtral", 5, 0.08), ("audioflamingo3", 10, 0.04)])
def test_windows_of_one_long_sound_are_heard_as_one(case, tokens, seconds, implementation):
    """A sound of two windows, then a short one: seconds count through the first, from 0 again in the second."""
    model = patch_model(make(case, implementation), told())
    short = 5 if case == "voxtral" else 4
    ids = [[5, *[PLACEHOLDER] * 2 * tokens, 6, *[PLACEHOLDER] * short, 7]]
    inputs = {**pad_rows(ids, padding="left"), "input_features": make_encoder_inputs(case)["input_features"]}
    if case == "audioflamingo3":
        inputs["input_features_mask"] = torch.ones(3, 40, dtype=torch.long)
        inputs["input_features_mask"][2, 17:] = 0
    late = (0.4 + seconds, 0.4 + 1.5 * seconds)
    for said, expected, index in (
        (Saliency.from_seconds(late), {tokens + 1: 0.5}, 0),
        (Saliency.from_seconds((seconds, 2 * seconds), sound=1), {1: 1}, 1),
    ):
        by_hand = token_by_token(expected, inputs, index=index)
        torch.testing.assert_close(logits(model, inputs, said), logits(model, inputs, by_hand))
        torch.testing.assert_close(generate(model, inputs, said)[1], generate(model, inputs, by_hand)[1])
    with pytest.raises(SaliencyError, match="reaches past audio 0 in row 0, of which the model hears 0.8 s"):
        logits(model, inputs, Saliency.from_seconds((0.7, 0.9)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", [logits, generate])
def test_placeholders_that_do_not_match_are_refused(case, how):
    model, inputs = patch_model(make(case), told()), inputs_for(case)
    position = int((inputs["input_ids"][0] == PLACEHOLDER).nonzero()[0])
    inputs["input_ids"][0, position] = 5
    modality = "image" if case in PICTURES else "audio"
    with pytest.raises(SaliencyError, match=rf"{modality} token count does not match: .* inputs make \[.*one call of the model's"):
        how(model, inputs, CASES[case][0])
    with pytest.raises(SaliencyError, match=r"make \[\] tokens"):
        how(model, {name: inputs[name] for name in ("input_ids", "attention_mask")}, CASES[case][0])


def test_scores_for_a_sound_whose_placeholder_was_not_expanded_are_refused():
    """Qwen2-Audio still takes one placeholder per sound and makes room itself: then no score is where it was meant."""
    model, inputs = patch_model(make("qwen2_audio"), told()), inputs_for("qwen2_audio")
    ids = torch.tensor([[5, PLACEHOLDER, 6]])
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **{k: v[:1] for k, v in inputs.items() if "feature" in k}}
    with pytest.raises(SaliencyError, match=r"rows hold \[1\] audio tokens, the audio inputs make \[10\]"):
        logits(model, short, Saliency.from_tokens([0.0, 1.0, 0.0]))


def test_a_mask_of_the_whole_picture_is_cut_as_llava_cuts_the_picture():
    model, inputs = patch_model(make("llava"), told()), inputs_for("llava")
    mask = np.zeros((12, 24))
    mask[:, 14:18] = 1  # the last column of what is seen
    by_hand = token_by_token({2: 1, 5: 1, 8: 1}, inputs)
    torch.testing.assert_close(logits(model, inputs, Saliency.from_mask(mask)), logits(model, inputs, by_hand))
    with pytest.raises(SaliencyError, match="lies where no token looks: of its width the model sees 25.0 to 75.0 %"):
        logits(model, inputs, Saliency.from_boxes((0, 0, 5, 12), WIDE))


def test_statements_combine_on_the_tokens_of_any_family():
    for case in ("llava_onevision", "voxtral"):
        model, inputs = patch_model(make(case), told()), inputs_for(case)
        said, expected = CASES[case]
        whole = Saliency.from_seconds((0, 0.4)) if case == "voxtral" else Saliency.from_mask(np.ones((12, 24)))
        combined = (3.0 * said & whole) + said * said
        by_hand = token_by_token({token: min(3 * score, 1) + score**2 for token, score in expected.items()}, inputs)
        torch.testing.assert_close(logits(model, inputs, combined), logits(model, inputs, by_hand))
