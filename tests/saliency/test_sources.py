"""Sources that look at the prompt as the decoder gets it, against what the plain eager model shows; previews; others' eyes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kit.gazing import generate, logits
from kit.tiny import make_model
from kit.tiny_encoders import PLACEHOLDER, PROJECTING, VIDEO, make_encoder_inputs, make_encoder_model
from kit.versions import cached
from PIL import Image

import hf_steer
from hf_steer import (
    AttentionConfig,
    ConfigError,
    PatchError,
    Saliency,
    SaliencyConfig,
    SaliencyError,
    SaliencyProvider,
    SteerConfig,
    disable_steering,
    patch_model,
    read_saliency,
    unpatch_model,
)
from hf_steer.saliency import SOURCES

IMPLEMENTATIONS = ("eager", "sdpa")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
GROUNDING = {0: (1,), 2: (0, 3)}
PROMPT_SOURCES = tuple(name for name, row in SOURCES.items() if row.prompt is not None)
every = pytest.mark.parametrize("family", PROJECTING)
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
sources = pytest.mark.parametrize("source", PROMPT_SOURCES)


def saliency_of(source, **options):
    own = {"decoder_attention": {"source_heads": GROUNDING, "last_tokens": 2}, "gradient": {"answer_token": 7}}.get(source, {})
    return SaliencyConfig(source=source, **own, **options)


def steered(model, source, **options):
    attention = AttentionConfig(heads={1: "all"}, strength=2.0, saliency=saliency_of(source, **options))
    return patch_model(model, SteerConfig(attention=attention))


def shown(family, inputs):
    """What the plain eager model shows: attentions, the decoder's input and the gradient of token 7's logit by it."""
    model = make_encoder_model(family, implementation="eager")
    door = {}

    def keep(module, args, kwargs):
        door["embeds"] = kwargs["inputs_embeds"].detach().requires_grad_()
        return args, {**kwargs, "inputs_embeds": door["embeds"]}

    with model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True):
        out = model(**inputs, output_attentions=True)
    last = last_real(inputs["attention_mask"])
    out.logits[torch.arange(len(last)), last, 7].sum().backward()
    return [own.detach() for own in out.attentions], door["embeds"].detach(), door["embeds"].grad


def last_real(mask):
    return torch.tensor([row.nonzero().max().item() for row in mask])


def oracle(source, family, inputs):
    """`(batch, tokens)` in plain fp64 loops."""
    attentions, embeds, gradient = shown(family, inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    result = torch.zeros(ids.shape, dtype=torch.float64)
    for row in range(len(ids)):
        real = mask[row].nonzero().flatten().tolist()
        vectors = embeds[row].double()
        for token in real:
            if source == "feature_norm":
                result[row, token] = math.sqrt(sum(x * x for x in vectors[token].tolist()))
            elif source == "text_similarity":
                words = [place for place in real if int(ids[row, place]) not in (PLACEHOLDER, VIDEO)]
                cosines = [float(vectors[token] @ vectors[w] / vectors[token].norm() / vectors[w].norm()) for w in words]
                result[row, token] = sum(cosines) / len(cosines)
            elif source == "decoder_attention":
                seen = [
                    float(attentions[layer][row, head, query, token])
                    for layer, heads in GROUNDING.items() for head in heads for query in real[-2:]
                ]
                result[row, token] = sum(seen) / len(seen)
            else:
                result[row, token] = float(gradient[row, token].double() @ vectors[token])
    return result


@every
@both
@sources
@pytest.mark.parametrize("padding", ["left", "right"])
def test_sources_give_what_the_plain_model_shows(family, implementation, source, padding):
    inputs = make_encoder_inputs(family, padding=padding)
    model = make_encoder_model(family, implementation=implementation)
    plain = logits(model, inputs)
    found = read_saliency(model, inputs, saliency=saliency_of(source))
    placeholder = (inputs["input_ids"] == PLACEHOLDER) | (inputs["input_ids"] == VIDEO)
    speaks = found.raw.group >= 0
    assert not (speaks & ~placeholder).any()
    assert speaks[placeholder].float().mean() > 0.8  # a newline has no place in the picture
    expected = oracle(source, family, inputs)
    torch.testing.assert_close(found.raw.values[speaks].double(), expected[speaks], rtol=2e-4, atol=2e-5)
    assert not hf_steer.get_steer_status(model).patched
    assert torch.equal(logits(model, inputs), plain)


@every
@both
@sources
def test_the_model_is_steered_by_what_is_previewed(family, implementation, source):
    inputs = make_encoder_inputs(family)
    model = make_encoder_model(family, implementation=implementation)
    found = read_saliency(model, inputs, saliency=saliency_of(source))
    plain = logits(model, inputs)
    steered(model, source, preserve_mass=False)
    own, said = logits(model, inputs), generate(model, inputs)
    assert (own - plain)[inputs["attention_mask"].bool()].abs().max() > 1e-3
    # a gradient is rounded by two passes, and a z-score magnifies that
    close = {"rtol": 1e-4, "atol": 1e-4} if source == "gradient" else TOLERANCE
    torch.testing.assert_close(said[1][:, 0], own[:, -1], **close)
    with disable_steering(model):
        assert torch.equal(logits(model, inputs), plain)
    as_said = SaliencyConfig(source=None, normalize="none")
    attention = AttentionConfig(heads={1: "all"}, strength=2.0, saliency=as_said, queries="all")
    patch_model(unpatch_model(model), SteerConfig(attention=attention))
    with hf_steer.use_saliency(model, found.saliency()):
        torch.testing.assert_close(logits(model, inputs), own, **close)
        torch.testing.assert_close(generate(model, inputs)[1], said[1], **close)
    unpatch_model(model)
    assert torch.equal(logits(model, inputs), plain)


WAYS = ({"cache_implementation": "static"}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2})
REPEATED = [
    (family, kwargs)
    for family in ("qwen2_vl", "qwen3_vl", "llava", "qwen2_audio")
    for kwargs in WAYS
    # for beams transformers repeats the sounds of a row one by one, so rows with two of them are wrong there
    if not ("num_beams" in kwargs and family == "qwen2_audio")
]


@pytest.mark.parametrize(("family", "kwargs"), REPEATED, ids=str)
@sources
def test_static_caches_beams_and_drafts_see_the_same(family, source, kwargs):
    inputs = make_encoder_inputs(family)
    if "prompt_lookup_num_tokens" in kwargs:
        inputs = first_row(family, inputs)
    model = steered(make_encoder_model(family), source)
    expected = generate(model, inputs)
    sequences, steps = generate(model, inputs, **kwargs) if "num_beams" not in kwargs else generate(
        model, inputs, **kwargs, num_return_sequences=2
    )
    if "num_beams" in kwargs:
        torch.testing.assert_close(steps[:, 0], expected[1][:, 0].repeat_interleave(2, 0), **TOLERANCE)
    else:
        assert torch.equal(sequences, expected[0])


def first_row(family, inputs):
    """Drafts need a batch of one: the first row and its two pictures or sounds."""
    keep = inputs["attention_mask"][0].bool()
    cut = {name: inputs[name][:1][:, keep] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in inputs}
    for name in ("input_features", "feature_attention_mask", "image_grid_thw"):
        if name in inputs:
            cut[name] = inputs[name][:2]
    if "pixel_values" in inputs:
        count = int(cut["image_grid_thw"].prod(1).sum()) if "image_grid_thw" in cut else 2
        cut["pixel_values"] = inputs["pixel_values"][:count]
    return cut


@pytest.mark.parametrize("source", PROMPT_SOURCES)
def test_a_second_turn_with_a_new_picture_sees_it_and_leaves_the_cache_alone(source):
    """The first pass of the second turn runs on a copy of the cache."""
    from kit.tiny import make_prompt
    from transformers import DynamicCache

    model = steered(make_model("qwen2_vl"), source)
    first, second = make_prompt("qwen2_vl", [[3, ("image", 2, 3), 4]]), make_prompt("qwen2_vl", [[2, ("image", 3, 2), 3]], seed=1)
    cache = DynamicCache(config=model.config)
    length = first["input_ids"].shape[1]
    with torch.no_grad():
        model(**first, **cached(cache), use_cache=True)
        before = cache.layers[0].keys.clone()
        added = second["input_ids"].shape[1]
        positions = 30 + torch.arange(added).view(1, 1, -1).expand(3, 1, -1)
        later = {name: value for name, value in second.items() if name != "attention_mask"}
        model(**later, **cached(cache), use_cache=True, position_ids=positions)
    assert torch.equal(cache.layers[0].keys[:, :, :length], before)
    assert cache.get_seq_length() == length + added
    scores = cache.hf_steer_state.scores
    assert (scores.group[0] >= 0).sum() == 12
    assert scores.values[0, scores.group[0] == int(scores.group.max())].abs().sum() > 0


def test_gradients_work_in_inference_mode_and_leave_none_behind():
    inputs = make_encoder_inputs("qwen2_vl")
    model = steered(make_encoder_model("qwen2_vl"), "gradient")
    expected = logits(model, inputs)
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_likeliest_token_is_the_answer_when_none_is_named():
    inputs = make_encoder_inputs("qwen2_vl")
    model = make_encoder_model("qwen2_vl")
    likeliest = int(logits(model, inputs)[0, -1].argmax())
    row = {"named": read_saliency(model, inputs, saliency=SaliencyConfig(source="gradient", answer_token=likeliest))}
    row["own"] = read_saliency(model, inputs, saliency=SaliencyConfig(source="gradient"))
    torch.testing.assert_close(row["own"].raw.values[0], row["named"].raw.values[0])


def test_heads_that_are_steered_look_when_none_are_named():
    inputs = make_encoder_inputs("qwen2_vl")
    model = make_encoder_model("qwen2_vl")
    attention = AttentionConfig(heads={1: (0, 2)}, strength=2.0, saliency=SaliencyConfig(source="decoder_attention"))
    patch_model(model, SteerConfig(attention=attention))
    found = read_saliency(model, inputs)
    unpatch_model(model)
    named = read_saliency(model, inputs, saliency=SaliencyConfig(source="decoder_attention", source_heads={1: (0, 2)}))
    torch.testing.assert_close(found.raw.values, named.raw.values)


@pytest.mark.parametrize("checkpointing", [False, True])
@sources
def test_training_is_steered_the_same_with_and_without_recomputation(source, checkpointing):
    inputs = make_encoder_inputs("qwen2_vl")
    model = make_encoder_model("qwen2_vl").train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    steered(model, source)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, labels=inputs["input_ids"]).loss, loss.detach())
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "eyes"}, "saliency.source must be one of None, 'vision_attention'"),
        ({"source_heads": "all"}, "saliency source 'vision_attention' has no source_heads; it has none"),
        ({"source": "gradient", "last_tokens": 2}, "saliency source 'gradient' has no last_tokens; it has answer_token"),
        ({"source": "decoder_attention", "last_tokens": 0}, "saliency.last_tokens must be a whole number of at least 1"),
        ({"source": "decoder_attention", "source_heads": {}}, 'saliency.source_heads must be "all" or a mapping'),
        ({"source": "gradient", "answer_token": "7"}, "saliency.answer_token must be a token id"),
    ],
)
def test_sources_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SaliencyConfig(**arguments)


def test_sources_that_do_not_fit_the_model_or_the_prompt_are_refused():
    text = make_model("llama")
    with pytest.raises(ConfigError, match="scores picture and sound tokens, which 'llama' has none of"):
        steered(text, "feature_norm")
    model = make_encoder_model("qwen2_vl")
    with pytest.raises(ConfigError, match=r"saliency.source_heads: heads \(9,\) asked for layer 1"):
        read_saliency(model, {}, saliency=SaliencyConfig(source="decoder_attention", source_heads={1: (9,)}))
    inputs = make_encoder_inputs("qwen2_vl")
    with pytest.raises(SaliencyError, match="answer_token=5000 is not in the vocabulary of 96"):
        read_saliency(model, inputs, saliency=SaliencyConfig(source="gradient", answer_token=5000))
    blind = {name: inputs[name][2:] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    for source in ("feature_norm", "vision_attention"):
        with pytest.raises(SaliencyError, match="no picture, video or sound in this prompt"):
            read_saliency(model, blind, saliency=SaliencyConfig(source=source))
    assert not hf_steer.get_steer_status(model).patched
    steered(model, "feature_norm")
    with pytest.raises(PatchError, match="patched with another source"):
        read_saliency(model, inputs, saliency=SaliencyConfig(source="gradient"))
    with pytest.raises(SaliencyError, match="whole prompt in one pass; leave out prefill_chunk_size"):
        generate(model, inputs, prefill_chunk_size=4)


# --- maps, and another model's eyes --------------------------------------------------------------------------------------


def test_maps_put_each_score_where_its_token_lies():
    inputs = make_encoder_inputs("qwen2_vl")
    found = read_saliency(make_encoder_model("qwen2_vl"), inputs)
    maps = found.maps()
    assert {place: tuple(own.shape) for place, own in maps.items()} == {
        ("image", 0, 0): (1, 2, 3), ("image", 0, 1): (1, 3, 2), ("image", 1, 0): (1, 2, 2),
    }
    own = found.raw.values[0][inputs["input_ids"][0] == PLACEHOLDER]
    assert torch.equal(maps["image", 0, 1].flatten(), own[6:])


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_a_map_that_is_read_back_says_the_same_again(family):
    """User map -> tokens -> map: a bright left half stays one, whatever the crops."""
    inputs = make_encoder_inputs(family)
    size = (24, 12) if family == "llava_onevision" else (12, 12)
    bright = torch.zeros(size[1], size[0])
    bright[:, : size[0] // 2] = 1
    given = Saliency.from_map(bright, image_size=size, row=1)
    model = make_encoder_model(family)
    found = read_saliency(model, inputs, given=given).maps(sizes={(1, 0): size})["image", 1, 0][0]
    width = found.shape[1]
    assert found[:, : width // 3].min() > 0.9
    assert found[:, -(width // 3) :].max() < 0.1


class Plain:
    """A processor for the tiny Qwen2-VL: one placeholder token per merged patch, whatever the text says."""

    def apply_chat_template(self, turns, **_):
        return str(sum(item["type"] == "image" for turn in turns for item in turn["content"]))

    def __call__(self, *, text, images, videos, return_tensors, padding):
        from kit.tiny import END, IMAGE, PATCH, START, pad_rows
        from transformers import BatchFeature, Qwen2VLImageProcessor

        side = {"shortest_edge": 64, "longest_edge": 4096}
        made = Qwen2VLImageProcessor(patch_size=PATCH, merge_size=2, size=side)(images, return_tensors="pt")
        counts = (made["image_grid_thw"].prod(1) // 4).tolist()
        rows = [[5] + [t for _ in range(int(own)) for t in [START, *[IMAGE] * counts.pop(0), END]] + [6] for own in text]
        inputs = pad_rows(rows, padding="left")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        return BatchFeature({**inputs, **made})


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def told(*images):
    return [{"role": "user", "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "?"}]}]


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_another_decoder_is_steered_by_a_qwen2_vls_eyes(family):
    """Its map of the original picture, resampled to the steered model's grid and crops."""
    eyes = make_model("qwen2_vl", seed=5)
    provider = SaliencyProvider(eyes, Plain())
    inputs = make_encoder_inputs(family)
    sizes = {"llava": [(56, 56)] * 3, "llava_onevision": [(112, 56)] * 3, "qwen2_5_vl": [(84, 56), (56, 84), (56, 56)]}[family]
    one, two, three = (picture(*size, seed) for seed, size in enumerate(sizes))
    outside = Saliency.external(provider, [told(one, two), told(three)])
    assert not hf_steer.get_steer_status(eyes).patched
    seen = provider.look([told(one, two), told(three)])
    assert [place for place in seen] == [("image", 0, 0), ("image", 0, 1), ("image", 1, 0)]
    by_hand = Saliency()
    for (_, row, index), (own, size, _) in seen.items():
        assert own.min() >= 0
        by_hand = by_hand + Saliency.from_map(own[0], image_size=size, row=row, image=index)
    model = make_encoder_model(family)
    plain = logits(model, inputs)
    patch_model(model, SteerConfig(attention=AttentionConfig(strength=2.0, saliency=SaliencyConfig(source=None))))
    found = []
    for statement in (outside, by_hand):
        with hf_steer.use_saliency(model, statement):
            found.append((logits(model, inputs), generate(model, inputs)[1]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert (found[0][0] - plain)[inputs["attention_mask"].bool()].abs().max() > 1e-2


def test_a_providers_picture_of_another_shape_is_refused_and_so_is_a_provider_that_has_no_grid():
    provider = SaliencyProvider(make_model("qwen2_vl", seed=5), Plain())
    inputs = make_encoder_inputs("llava_onevision")  # whose pictures are twice as wide as high
    model = make_encoder_model("llava_onevision")
    patch_model(model, SteerConfig(attention=AttentionConfig(strength=2.0, saliency=SaliencyConfig(source=None))))
    tall = Saliency.external(provider, told(picture(56, 112, 0)))
    with hf_steer.use_saliency(model, tall), pytest.raises(SaliencyError, match="56 x 112 pixels, a ratio of 0.5; the model"):
        logits(model, inputs)
    with pytest.raises(PatchError, match="must be a Qwen-VL model"):
        SaliencyProvider(model, Plain())
    with pytest.raises(SaliencyError, match="no picture and no video in these messages"):
        Saliency.external(provider, [{"role": "user", "content": [{"type": "text", "text": "?"}]}])


def test_a_provider_watches_videos_and_pictures_through_a_real_processor():
    """A row with a picture and a video: each frame of the video has a map of its own."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from hf_steer.embedded import embedded_model_dir

    folder = embedded_model_dir()
    processor = AutoProcessor.from_pretrained(folder)
    eyes, model = (AutoModelForImageTextToText.from_pretrained(folder).eval() for _ in range(2))
    frames = [picture(112, 56, seed) for seed in range(4)]
    content = [{"type": "video", "video": frames}, {"type": "image", "image": picture(56, 84, 9)}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}]
    provider = SaliencyProvider(eyes, processor)
    seen = provider.look([messages])
    assert not torch.equal(seen["video", 0, 0][0][0], seen["video", 0, 0][0][1])
    outside = Saliency.external(provider, messages)
    from qwen_vl_utils import process_vision_info

    images, videos = process_vision_info(messages)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=images, videos=videos, return_tensors="pt")
    grids = {"image": inputs["image_grid_thw"][0], "video": inputs["video_grid_thw"][0]}
    for (modality, _, _), (own, _, times) in seen.items():
        frames, height, width = grids[modality].tolist()
        assert tuple(own.shape) == (frames, height // 2, width // 2)
        assert (frames, times.frames) == ({"image": 1, "video": 2}[modality],) * 2
    found = read_saliency(model, inputs, given=outside)
    for place, own in found.maps().items():
        torch.testing.assert_close(own, seen[place][0], rtol=1e-5, atol=1e-6)
    patch_model(model, SteerConfig(attention=AttentionConfig(strength=4.0, saliency=SaliencyConfig(source=None))))
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with hf_steer.use_saliency(model, outside):
        steered_too = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert not torch.equal(plain.logits[0], steered_too.logits[0])
