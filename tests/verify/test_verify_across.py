"""`hf_steer.verify` on decoders that read an encoder by cross-attention, and on layers that are not all attention."""

from __future__ import annotations

import pytest
import torch
import transformers
from kit.crossing import CROSSING, make_crossing_inputs, make_crossing_model
from kit.tiny import settle_generation, spread
from kit.tiny_masked import make_masked, prompt_of
from kit.versions import RELEASE

from hf_steer import AttentionConfig, ConfigError, SaliencyConfig, patch_model, verify
from hf_steer.families import resolve
from hf_steer.patching.gaze.biases import BiasMaker
from hf_steer.values import HeadBias
from hf_steer.verify import BUDGET

ACROSS = AttentionConfig(attends="cross", strength=1.3, saliency=SaliencyConfig(source=None, normalize="none"))
ENCODERS_PROMPT = {"no leak", "padding"}
"""What cannot be shown where the prompt is an encoder's."""
NOT_LONGER = {"padding", "decoding", "beams"}
"""Mllama's inputs say token by token which tiles are seen, so its prompt cannot be made longer."""
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def crossing(family):
    model = make_crossing_model(family, "eager")
    if not resolve(model).crosses or (family == "mllama" and RELEASE < (5, 20)):
        pytest.skip("older releases call no attention function there, or warn of their own arguments")
    return model


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", CROSSING)
def test_a_gaze_at_what_an_encoder_hands_on_is_verified(family, patched):
    model, inputs = crossing(family), make_crossing_inputs(family)
    if patched:
        patch_model(model, ACROSS)
    report = verify(model, inputs, config=ACROSS if family == "mllama" and not patched else None)
    assert report.holds, str(report)
    expected = NOT_LONGER if family == "mllama" else ENCODERS_PROMPT
    assert {check.name for check in report.unshown} == {"aligners"} | expected
    assert report.passes <= BUDGET


def test_a_sound_that_is_decoded_in_several_stretches_is_verified():
    """A Whisper may write a timestamp where none was asked for, and transformers then goes on behind it."""
    model = crossing("whisper")
    model.generation_config.no_timestamps_token_id = 24
    inner, starts = type(model).generate_with_fallback, []

    class Spy(type(model)):
        def generate_with_fallback(self, **kwargs):
            starts.extend(float(kwargs["seek"][row]) for row in kwargs["batch_idx_map"])
            return inner(self, **kwargs)

    Spy.__name__ = type(model).__name__
    model.__class__ = Spy
    report = verify(model, make_crossing_inputs("whisper"), only=["receipt", "backend"])
    assert max(starts) > 0
    assert report.holds, str(report)


def test_words_of_the_decoder_are_made_where_the_inputs_lack_them():
    report = verify(crossing("t5"))
    assert report.holds, str(report)
    assert {check.name for check in report.unshown} == {"aligners"} | ENCODERS_PROMPT


def test_a_bias_across_that_goes_astray_is_found(monkeypatch):
    every = BiasMaker.every
    monkeypatch.setattr(
        BiasMaker, "every", lambda self: {layer: HeadBias(own.query / 2, own.key) for layer, own in every(self).items()}
    )
    report = verify(make_crossing_model("bart"), make_crossing_inputs("bart"), only=["receipt"])
    assert [check.why for check in report.broken] == ["what was added to the logits is not λ times the score that was said"]


def small(kind, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    spread(model, 0)
    settle_generation(model)
    return model


@pytest.mark.parametrize(
    ("kind", "more"), [("Lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}), ("StableLm", {})]
)
def test_layers_without_attention_and_decoders_that_drop_keywords_are_verified(kind, more):
    report = verify(small(kind, **more))
    assert report.holds, str(report)
    assert {check.name for check in report.unshown} == {"aligners"}
    layers = 2 if more else 4
    assert f"{4 * layers} heads in {layers} layers" in {check.name: check.why for check in report.checks}["receipt"]


def test_layers_that_get_their_bias_with_their_mask_are_verified_as_far_as_they_can_be_seen():
    report = verify(make_masked("bloom"), prompt_of("bloom"))
    assert report.holds, str(report)
    assert {check.name for check in report.unshown} == {"aligners", "backend"}
    whys = {check.name: check.why for check in report.checks}
    assert "BloomAttention calls no attention function that can be exchanged" in whys["backend"]
    assert "head by head it is not seen: BloomAttention" in whys["receipt"]


def test_inputs_on_which_the_model_itself_fails_are_refused_with_its_own_words():
    model = small("StableLm")
    with pytest.raises(ConfigError, match="the model itself fails on these inputs, unsteered .IndexError: "):
        verify(model, {"input_ids": torch.full((1, 4), 96)})
