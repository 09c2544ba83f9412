"""The gaze of decoders that read an encoder by cross-attention: words of BART and T5, seconds of Whisper, tiles of Mllama."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from kit.crossing import CROSSING, LISTENING, SOURCE, biased, make_crossing_inputs, make_crossing_model, positions_of
from kit.tiny import make_model

from hf_steer import (
    AttentionConfig,
    ConfigError,
    Saliency,
    SaliencyConfig,
    SaliencyError,
    SteerConfig,
    disable_steering,
    get_steer_status,
    patch_model,
    unpatch_model,
    use_saliency,
)  # fmt: skip
from hf_steer.families import resolve
from hf_steer.testing.zoo import tiny_inputs, tiny_model

every = pytest.mark.parametrize("family", CROSSING)
AS_GIVEN = SaliencyConfig(source=None, normalize="none")
HEADS = 4


def across(strength=1.3, **how):
    return AttentionConfig(attends="cross", strength=strength, saliency=AS_GIVEN, **how)


def said_of(family, positions, seed=2):
    scores = torch.randn(2, positions, generator=torch.Generator().manual_seed(seed))
    if family in ("bart", "t5"):
        scores[1, -3:] = 0  # padding
    return scores


def as_bias(scores, strengths=(1.3,) * HEADS):
    return torch.tensor(strengths)[None, :, None] * scores[:, None]


def logits(model, inputs, **how):
    with torch.no_grad():
        return model(**inputs, **how).logits


@every
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_pass_equals_the_oracle_and_says_nothing_equals_the_plain_model(family, implementation):
    model, inputs = make_crossing_model(family, implementation), make_crossing_inputs(family)
    plain, positions = logits(model, inputs), positions_of(model, inputs)
    scores = said_of(family, positions)
    with biased(model, as_bias(scores)) as (twin, _):
        expected = logits(twin, inputs)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    patch_model(model, across())
    found = logits(model, inputs, saliency=Saliency.from_tokens(scores))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)  # float32, other order of sums
    assert not torch.allclose(found, plain, atol=1e-2)
    assert torch.equal(logits(model, inputs), plain)
    with disable_steering(model), use_saliency(model, Saliency.from_tokens(scores)):
        assert torch.equal(logits(model, inputs), plain)
    unpatch_model(model)
    assert torch.equal(logits(model, inputs), plain)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["SeamlessM4TForTextToText", "SeamlessM4TForSpeechToText"])
def test_seamless_reads_its_words_or_its_sound_where_it_is_told(name):
    model = tiny_model("seamless_m4t", name)
    inputs = tiny_inputs(model)
    plain = logits(model, inputs)
    with biased(model, None, modules=("cross_attention",)) as (twin, keys):
        logits(twin, inputs)
    if not keys:
        pytest.skip("the SeamlessM4T of this release looks no attention function up")
    scores = torch.randn(2, max(keys), generator=torch.Generator().manual_seed(0))
    with biased(model, as_bias(scores), modules=("cross_attention",)) as (twin, _):
        expected = logits(twin, inputs)
    found = logits(patch_model(model, across()), inputs, saliency=Saliency.from_tokens(scores))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(logits(unpatch_model(model), inputs), plain)


@every
def test_each_head_has_its_own_strength_and_heads_that_are_not_named_have_none(family):
    model, inputs = make_crossing_model(family), make_crossing_inputs(family)
    scores = said_of(family, positions_of(model, inputs))
    layers = [site.index for site in resolve(model).crosses]
    assert len(layers) >= 2
    strengths = {layers[-1]: {0: 2.0, 3: -1.0}}
    patch_model(model, AttentionConfig(attends="cross", heads={layers[-1]: (0, 3)}, strength=strengths, saliency=AS_GIVEN))
    found = logits(model, inputs, saliency=Saliency.from_tokens(scores))
    unpatch_model(model)
    ends = [site.name for site in resolve(model).crosses]
    with biased(model, as_bias(scores, (2.0, 0.0, 0.0, -1.0)), modules=(ends[-1],)) as (twin, _):
        torch.testing.assert_close(found, logits(twin, inputs), atol=2e-5, rtol=1e-4)


@every
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}])
def test_generate_is_steered_in_every_step(family, how):
    model, inputs = make_crossing_model(family), make_crossing_inputs(family)
    scores = said_of(family, positions_of(model, inputs))
    if family == "whisper":
        inputs = {"input_features": inputs["input_features"]}
    many = {**inputs, "max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True, **how}
    with biased(model, as_bias(scores)) as (twin, _):
        expected = twin.generate(**many)
    plain = model.generate(**many)
    patch_model(model, across())
    found = model.generate(**many, saliency=Saliency.from_tokens(scores))
    assert torch.equal(found.sequences, expected.sequences)
    for step, wanted in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, wanted, atol=5e-5, rtol=1e-3)
    assert not torch.allclose(found.logits[-1], plain.logits[-1], atol=1e-2)
    assert torch.equal(model.generate(**many).sequences, plain.sequences)


def test_generated_queries_alone_are_steered_where_the_configuration_says_so():
    model, inputs = make_crossing_model("bart"), make_crossing_inputs("bart")
    scores = said_of("bart", SOURCE)
    plain = logits(model, inputs)
    whole = logits(patch_model(model, across()), inputs, saliency=Saliency.from_tokens(scores))
    patch_model(unpatch_model(model), across(queries="generated"))
    found = logits(model, inputs, saliency=Saliency.from_tokens(scores))
    torch.testing.assert_close(found[:, :-1], plain[:, :-1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[:, -1], plain[:, -1], atol=1e-3)
    assert not torch.allclose(found[:, -1], whole[:, -1], atol=1e-4)


def test_a_block_around_generate_says_it_as_the_call_does():
    model, inputs = patch_model(make_crossing_model("t5"), across()), make_crossing_inputs("t5")
    said = Saliency.from_tokens(said_of("t5", SOURCE))
    with use_saliency(model, said):
        around = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(around, model.generate(**inputs, max_new_tokens=5, saliency=said))


def test_what_the_encoder_made_of_padding_gets_no_bias():
    model, inputs = patch_model(make_crossing_model("bart"), across()), make_crossing_inputs("bart")
    scores = said_of("bart", SOURCE)
    padded = scores.clone()
    padded[1, -3:] = 5.0
    expected = logits(model, inputs, saliency=Saliency.from_tokens(scores))
    assert torch.equal(logits(model, inputs, saliency=Saliency.from_tokens(padded)), expected)


def test_seconds_of_a_sound_fall_on_whispers_frames():
    model, inputs = make_crossing_model("whisper"), make_crossing_inputs("whisper")
    scores = torch.zeros(2, 50)
    scores[1, 11:25] = 1.0  # a position is 20 ms, around its middle
    scores[1, [10, 25, 41]] = 0.5
    with biased(model, as_bias(scores)) as (twin, _):
        expected = logits(twin, inputs)
    patch_model(model, across())
    said = Saliency.from_seconds([(0.2, 0.5), (0.81, 0.82)], row=1)
    torch.testing.assert_close(logits(model, inputs, saliency=said), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:backend .* gives way to")
@pytest.mark.parametrize("backend", ["auto", "folded", "mask", "cpu_flash", "flex"])
def test_times_of_tokens_are_read_from_steered_attention(backend):
    """transformers sets eager attention to read the weights, and leaves the model so; the steering goes along."""
    model, inputs = make_crossing_model("whisper"), make_crossing_inputs("whisper")
    model.generation_config.no_timestamps_token_id, model.generation_config.alignment_heads = 70, [[0, 1], [2, 3]]
    scores = said_of("whisper", 50)
    timed = {"input_features": inputs["input_features"], "attention_mask": torch.ones(2, 100, dtype=torch.long),
             "return_token_timestamps": True, "return_dict_in_generate": True, "max_new_tokens": 6}  # fmt: skip
    with biased(model, as_bias(scores)) as (twin, _):
        expected = twin.generate(**timed)
    plain = copy.deepcopy(model).generate(**timed)
    assert model.config._attn_implementation == "sdpa"
    patch_model(model, across(backend=backend))
    found = model.generate(**timed, saliency=Saliency.from_tokens(scores))
    assert model.config._attn_implementation == "eager"
    assert torch.equal(found["sequences"], expected["sequences"])
    assert torch.equal(found["token_timestamps"], expected["token_timestamps"])
    assert not torch.equal(found["token_timestamps"], plain["token_timestamps"])
    again = model.generate(**timed)  # nothing is said
    assert torch.equal(again["token_timestamps"], plain["token_timestamps"])
    unpatch_model(model)
    assert torch.equal(model.generate(**timed)["token_timestamps"], plain["token_timestamps"])


def test_a_long_sound_is_steered_stretch_by_stretch():
    """Row 1 is decoded in stretches of a second; what is said of second 1.3 on is heard in those that hold it."""
    model = make_crossing_model("whisper")
    model.generation_config.no_timestamps_token_id = 70
    mels = torch.randn(2, 8, 250, generator=torch.Generator().manual_seed(3))
    long = {"input_features": mels, "attention_mask": torch.ones(2, 250, dtype=torch.long), "return_timestamps": True,
            "max_new_tokens": 6}  # fmt: skip
    patch_model(model, across(strength=4.0))
    starts, biases = [], []
    encoder = model.get_encoder()
    handle = encoder.register_forward_pre_hook(lambda module, args, kwargs: starts.append(kwargs or args), with_kwargs=True)
    inner = type(model).generate_with_fallback

    class Spy(type(model)):
        def generate_with_fallback(self, **kwargs):
            biases.append((tuple(kwargs["batch_idx_map"]), [float(kwargs["seek"][row]) / 100 for row in kwargs["batch_idx_map"]]))
            return inner(self, **kwargs)

    model.__class__ = Spy
    said = Saliency.from_seconds([(1.3, 1.6)], row=1)
    found = model.generate(**long, saliency=said)
    plain = model.generate(**long)
    handle.remove()
    assert max(second for _, seconds in biases for second in seconds) >= 1.0
    assert not torch.equal(found, plain)
    assert torch.equal(found[0, :3], plain[0, :3])
    past = "span (1.3, 2.6) reaches past audio 0 in row 1, of which the model hears 2.5 s"
    with pytest.raises(SaliencyError, match=re.escape(past)):
        model.generate(**long, saliency=Saliency.from_seconds([(1.3, 2.6)], row=1))
    with pytest.raises(SaliencyError, match="speaks of one window, and this sound is longer"):
        model.generate(**long, saliency=Saliency.from_tokens(torch.ones(2, 50)))


def test_scores_of_a_window_go_on_with_it_where_a_written_timestamp_ends_a_stretch():
    """A sound of one window is decoded in stretches, too: what is left of it moves to the encoder's first positions."""
    model = make_crossing_model("whisper")
    model.generation_config.no_timestamps_token_id = 70
    mels = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(2))
    heard = {"input_features": mels, "return_timestamps": True, "max_new_tokens": 12}
    starts, inner = [], type(model).generate_with_fallback

    class Spy(type(model)):
        def generate_with_fallback(self, **kwargs):
            starts.append([float(kwargs["seek"][row]) for row in kwargs["batch_idx_map"]])
            return inner(self, **kwargs)

    model.__class__ = Spy
    patch_model(model, across(strength=1.0))
    scores = torch.zeros(2, 50)
    scores[:, 30:45] = 1.0
    plain = model.generate(**heard)
    starts.clear()
    found = model.generate(**heard, saliency=Saliency.from_tokens(scores))
    assert any(start > 0 for row in starts for start in row)
    said = Saliency.from_seconds([(0.59, 0.89)], row=0) + Saliency.from_seconds([(0.59, 0.89)], row=1)
    assert torch.equal(found, model.generate(**heard, saliency=said))
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("family", LISTENING)
def test_training_reaches_learned_strengths(family):
    model, inputs = make_crossing_model(family), make_crossing_inputs(family)
    scores = said_of(family, positions_of(model, inputs))
    patch_model(model, AttentionConfig(attends="cross", strength="trainable", saliency=AS_GIVEN))
    model.train()
    labels = inputs.pop("decoder_input_ids")
    model(**inputs, labels=labels, saliency=Saliency.from_tokens(scores)).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_the_decoders_own_prompt_is_steered_by_self_attention():
    model, inputs = make_crossing_model("bart"), make_crossing_inputs("bart")
    plain = logits(model, inputs)
    scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(4))
    with biased(model, as_bias(scores), modules=("self_attn",)) as (twin, _):
        for layer in twin.get_encoder().layers:  # its words are no prompt
            layer.self_attn.forward = type(layer.self_attn).forward.__get__(layer.self_attn)
        names = tuple(f"decoder.layers.{index}.self_attn" for index in range(3))
    with biased(model, as_bias(scores), modules=names) as (twin, _):
        expected = logits(twin, inputs)
    patch_model(model, AttentionConfig(strength=1.3, saliency=AS_GIVEN, queries="all"))
    found = logits(model, inputs, saliency=Saliency.from_tokens(scores))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(logits(model, inputs), plain)


def test_a_copy_and_a_saved_configuration_keep_what_attends(tmp_path):
    model, inputs = patch_model(make_crossing_model("bart"), across()), make_crossing_inputs("bart")
    said = Saliency.from_tokens(said_of("bart", SOURCE))
    expected = logits(model, inputs, saliency=said)
    assert torch.equal(logits(copy.deepcopy(model), inputs, saliency=said), expected)
    get_steer_status(model).config.save_pretrained(tmp_path)
    config = SteerConfig.from_pretrained(tmp_path)
    assert config.attention.attends == "cross"
    assert torch.equal(logits(patch_model(unpatch_model(model), config), inputs, saliency=said), expected)


def test_what_does_not_fit_is_an_error_that_says_what_would():
    model, inputs = patch_model(make_crossing_model("whisper"), across()), make_crossing_inputs("whisper")
    with pytest.raises(SaliencyError, match=r"has 49 scores a row; the encoder hands on 50 positions, padding included"):
        model(**inputs, saliency=Saliency.from_tokens(torch.ones(2, 49)))
    with pytest.raises(SaliencyError, match="where pictures lie among what the encoder of 'whisper' hands on is not known.*50 pos"):
        model(**inputs, saliency=Saliency.from_boxes([(0, 0, 2, 2)], (5, 5)))
    with pytest.raises(SaliencyError, match="of which the model hears 1 s"):
        model(**inputs, saliency=Saliency.from_seconds([(0.2, 1.5)]))
    with pytest.raises(SaliencyError, match="speaks of 3 rows, and the decoder has 2"):
        model(**inputs, saliency=Saliency.from_tokens(torch.ones(3, 50)))
    bart, words = patch_model(make_crossing_model("bart"), across()), make_crossing_inputs("bart")
    with pytest.raises(SaliencyError, match="where seconds lie among what the encoder of 'bart' hands on is not known"):
        bart(**words, saliency=Saliency.from_seconds([(0.2, 0.5)]))
    with pytest.raises(ConfigError, match="attends='cross' needs a decoder that reads an encoder.*Qwen2Model does not.*'self'"):
        patch_model(make_model("qwen2"), across())
    with pytest.raises(ConfigError, match="of which source 'feature_norm' knows nothing; set saliency=SaliencyConfig"):
        AttentionConfig(attends="cross", saliency="feature_norm")
    with pytest.raises(ConfigError, match=r"attention.attends must be one of 'self', 'cross'"):
        AttentionConfig(attends="encoder", saliency=AS_GIVEN)
