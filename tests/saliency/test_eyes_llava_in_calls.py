"""The eyes of the LLaVAs in every kind of call."""

from __future__ import annotations

import copy
import gc
import threading

import peft
import pytest
import torch
from kit import tiny
from kit.gazing import TOLERANCE, generate, logits, real_logits
from kit.llava_eyes import ROWS, SIDE, SOURCES, each, every, make_model, make_prompt, picture_tokens, steer
from kit.tiny_encoders import PLACEHOLDER
from kit.versions import cached
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_steer
from hf_steer import Saliency, SaliencyError, patch_model, unpatch_model
from hf_steer.ground.arguments import Given
from hf_steer.patching.gaze.arrange import read_arrangements
from hf_steer.saliency import EyeRecord, current_recorder


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
    assert not [kept for kept in gc.get_objects() if type(kept) is EyeRecord]
