"""What aligners read, and what reads them next: frames and words, pictures, videos and sounds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from kit.aligning import MASKED, PROMPTED, TOLERANCE, align, aligned, generate, logits, stir
from kit.tiny import SEEING, make_prompt
from kit.tiny_encoders import ENCODING, MELS, PLACEHOLDER, labels_for, make_encoder_inputs, make_encoder_model
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from hf_steer import AlignerError, disable_steering, patch_model, unpatch_model
from hf_steer.training import record_routing


@pytest.mark.parametrize("family", ENCODING)
def test_what_is_read_next_is_what_the_aligner_gave(family):
    """By hand: the features at the encoder's outlet, through the aligner as a pure module, into the unpatched rest."""
    model = aligned(family, "output", "progressive")
    inputs = make_encoder_inputs(family)
    expected = logits(model, inputs)
    aligner = copy.deepcopy(model.hf_steer.aligners[0])
    encoder = model.hf_steer.plan.aligners[0].encoder
    unpatch_model(model)
    if encoder.reads:
        handle = encoder.outlet.register_forward_pre_hook(lambda module, args: (aligner(args[0]), *args[1:]))
    else:

        def after(module, args, output):
            output.last_hidden_state = aligner(output.last_hidden_state)

        handle = encoder.outlet.register_forward_hook(after)
    assert torch.equal(logits(model, inputs), expected)
    handle.remove()


@pytest.mark.parametrize("family", ENCODING)
def test_each_layer_gets_its_own_part_of_the_layer_wise_aligner(family):
    model = aligned(family, "layers", "layer_wise", layers=(0, -1))
    inputs = make_encoder_inputs(family)
    expected = logits(model, inputs)
    aligner = copy.deepcopy(model.hf_steer.aligners[0])
    sites = [site.module for site in model.hf_steer.plan.aligners[0].layers]
    assert aligner.layer_scales.shape == (2,)
    unpatch_model(model)
    handles = [
        site.register_forward_hook(
            lambda module, args, output, number=number: (
                (aligner(output[0], number), *output[1:]) if isinstance(output, tuple) else aligner(output, number)
            ),
            prepend=True,
        )
        for number, site in enumerate(sites)
    ]
    assert torch.equal(logits(model, inputs), expected)
    for handle in handles:
        handle.remove()


def test_hidden_states_that_the_encoder_returns_are_the_steered_ones():
    model = aligned("whisper", "output", "simple")
    inputs = make_encoder_inputs("whisper")
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
        encoded = model.get_encoder()(inputs["input_features"])
    assert torch.equal(out.encoder_hidden_states[-1], out.encoder_last_hidden_state)
    assert torch.equal(encoded.last_hidden_state, out.encoder_last_hidden_state)
    with torch.no_grad():
        reused = model(decoder_input_ids=inputs["decoder_input_ids"], encoder_outputs=encoded).logits
        assert torch.equal(model(**inputs, return_dict=False)[0], out.logits)
    torch.testing.assert_close(reused, out.logits)


@pytest.mark.parametrize(("family", "placement", "kind"), [case for case in PROMPTED if case[1] == "projector"])
def test_the_answer_is_never_read_by_the_aligner(family, placement, kind):
    model = aligned(family, placement, kind)
    inputs = make_encoder_inputs(family)
    labels = labels_for(family, inputs)
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][:, -1] = 7
    before, after = (logits(model, each, labels=labels) for each in (inputs, changed))
    real = inputs["attention_mask"].bool()[:, :-1]
    assert torch.equal(before[:, :-1][real], after[:, :-1][real])
    if kind not in ("simple", "merged"):  # without labels all text is the prompt's, and a word of it matters
        assert not torch.equal(logits(model, inputs)[:2, :-1], logits(model, changed)[:2, :-1])


@pytest.mark.parametrize(("family", "placement", "kind"), MASKED)
def test_padded_frames_never_influence_real_ones(family, placement, kind):
    model = aligned(family, placement, kind)
    inputs = make_encoder_inputs(family)
    loud = dict(inputs)
    if family == "qwen2_audio":
        padded = inputs["feature_attention_mask"] == 0
        padded[:, 24:26] = padded[:, 17:19] = False  # what the convolutions' kernels reach
        loud["input_features"] = inputs["input_features"].masked_fill(padded.unsqueeze(1), 9.0)
        real = inputs["attention_mask"].bool()
    else:
        padded = inputs["attention_mask"] == 0
        padded[:, 251:275] = False
        loud["input_values"] = inputs["input_values"].masked_fill(padded, 9.0)
        count = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
        real = torch.arange(logits(model, inputs).shape[1])[None] < count[:, None]
    torch.testing.assert_close(logits(model, loud)[real], logits(model, inputs)[real], **TOLERANCE)
    labels = labels_for(family, inputs)
    model.train()  # where the load-balancing loss counts frames, too
    torch.testing.assert_close(*(model(**each, labels=labels).loss for each in (inputs, loud)))


@pytest.mark.parametrize("family", ["whisper", "qwen2_audio", "wav2vec2"])
def test_statistics_count_real_frames_alone(family):
    model = aligned(family, "output", "simple")
    inputs = make_encoder_inputs(family)
    mask = "feature_attention_mask" if family == "qwen2_audio" else "attention_mask"
    with record_routing(model) as listener:
        logits(model, inputs)
        told = listener.read()
        assert listener.read() == {}
    place = next(name for name in told if name.endswith("usage"))
    assert sum(told[place]) == pytest.approx(1.0)
    encoder, seen = model.hf_steer.plan.aligners[0].encoder, {}
    handles = [
        encoder.outlet.register_forward_pre_hook(lambda module, args: seen.update(read=args[0] if args else None)),
        encoder.outlet.register_forward_hook(lambda module, args, output: seen.update(given=output)),
    ]
    with disable_steering(model):
        logits(model, inputs)
    for handle in handles:
        handle.remove()
    features = seen["read"] if encoder.reads else seen["given"].last_hidden_state
    frames = features.shape[1]
    lengths = {
        "whisper": [20, 12, 20], "qwen2_audio": [10, 6, 4],
        "wav2vec2": None if family != "wav2vec2" else model._get_feat_extract_output_lengths(inputs[mask].sum(1)).tolist(),
    }[family]  # fmt: skip
    real = torch.arange(frames)[None] < torch.tensor(lengths)[:, None]
    _, routing = model.hf_steer.aligners[0](features, return_routing=True)
    expected = routing.scores["experts"][real].mean(0)
    torch.testing.assert_close(torch.tensor(told[place]), expected)


def test_a_mask_of_four_dimensions_hides_padding_from_the_aligner_as_well():
    model = aligned("llava", "projector", "cross_modal_adapter")
    inputs = make_encoder_inputs("llava")
    real = inputs["attention_mask"].bool()
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    four = {**inputs, "attention_mask": (causal & real[:, None, :])[:, None], "position_ids": positions}
    two = {**inputs, "position_ids": positions}
    torch.testing.assert_close(logits(model, four)[real], logits(model, two)[real], **TOLERANCE)


def test_layers_are_logged_under_their_own_numbers():
    model = aligned("whisper", "layers", "simple", layers=(-1,))
    with record_routing(model) as listener:
        logits(model, make_encoder_inputs("whisper"))
    assert {name.split("/")[0] for name in listener.read()} == {"audio.layers.2"}


@pytest.mark.parametrize("family", SEEING)
@pytest.mark.parametrize(("placement", "kind"), [("output", "simple"), ("projector", "cross_modal_adapter")])
def test_video_goes_through_the_same_aligner_as_pictures(family, placement, kind):
    inputs = make_prompt(family, [[3, ("image", 2, 2), 2, ("video", 3, 2, 3), 4], [2, ("video", 2, 2, 2), 5]])
    plain = logits(make_encoder_model(family), inputs)
    model = patch_model(make_encoder_model(family), align(family, placement, kind))
    assert torch.equal(logits(model, inputs), plain)
    stir(model)
    steered = logits(model, inputs)
    assert (steered[1] - plain[1]).abs().max() > 0.05  # the row that has nothing but a video
    torch.testing.assert_close(generate(model, inputs)[1][:, 0], steered[:, -1], **TOLERANCE)


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_sound_comes_in_through_the_real_feature_extractors(family):
    random = np.random.default_rng(0)
    sounds = [random.standard_normal(length).astype("float32") for length in (6400, 4000)]
    model = aligned(family, "layers", "layer_wise")
    if family == "whisper":
        extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1, hop_length=400)
        inputs = extractor(sounds, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
        assert model.generate(**inputs, max_new_tokens=4).shape[0] == 2
        inputs["decoder_input_ids"] = torch.ones(2, 3, dtype=torch.long)
    else:
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True)
        inputs = extractor(sounds, sampling_rate=16000, return_tensors="pt", padding=True)
        alone = extractor(sounds[1], sampling_rate=16000, return_tensors="pt")
        frames = logits(model, alone).shape[1]
        torch.testing.assert_close(logits(model, inputs)[1, :frames], logits(model, alone)[0], **TOLERANCE)
    with record_routing(model) as listener:
        steered = logits(model, inputs)
    assert len(listener.read()) == 3 * 3  # layers and statistics
    with disable_steering(model):
        assert (logits(model, inputs) - steered).abs().max() > 0.05


def test_features_behind_the_projector_need_their_placeholders():
    model = aligned("qwen2_audio", "projector", "simple")
    inputs = make_encoder_inputs("qwen2_audio")
    short = {**inputs, "input_ids": inputs["input_ids"][2:], "attention_mask": inputs["attention_mask"][2:]}
    short["input_ids"] = torch.tensor([[5, PLACEHOLDER, 7]])
    short["attention_mask"] = torch.ones(1, 3, dtype=torch.long)
    short["input_features"], short["feature_attention_mask"] = inputs["input_features"][:1], inputs["feature_attention_mask"][:1]
    with pytest.raises(AlignerError, match="needs input_ids with one placeholder token per feature"):
        logits(model, short)


def test_a_prompt_without_words_is_refused():
    model = aligned("llava", "projector", "cross_modal_adapter")
    inputs = make_encoder_inputs("llava")
    ids = torch.full((1, 9), PLACEHOLDER)
    with pytest.raises(AlignerError, match=r"text of rows \[0\] has no real token"):
        logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"][:1]})
