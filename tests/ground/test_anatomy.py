"""What is read of a model's configuration and signatures: found under some spelling, or an error that says what was looked for."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from kit import tiny
from kit.tiny_encoders import PLACEHOLDER, VIDEO, make_encoder_config, make_encoder_model

from hf_steer import PatchError, SaliencyError
from hf_steer.families import FAMILIES, resolve
from hf_steer.ground import pictures
from hf_steer.ground.anatomy import resolve_row
from hf_steer.ground.arguments import Given
from hf_steer.ground.settings import SETTINGS, end_tokens, setting
from hf_steer.registry import EncoderRow, Family

MASKED = ("qwen2_audio", "audioflamingo3", "whisper", "wav2vec2", "hubert")


@pytest.mark.parametrize("family", MASKED)
def test_the_mask_of_frames_is_an_argument_that_the_model_takes(family):
    model = make_encoder_model(family)
    mask = resolve(model).encoders["audio"].mask
    assert mask in inspect.signature(inspect.unwrap(type(model).forward)).parameters


def test_a_head_that_is_told_no_mask_of_frames_has_none():
    config = make_encoder_config("whisper")
    with torch.device("meta"):
        model = transformers.WhisperForAudioClassification(config)
    assert resolve(model).encoders["audio"].mask is None


def test_a_row_may_say_where_an_encoder_is(monkeypatch):
    model = make_encoder_model("qwen2_audio")
    row = Family(placeholders=("audio",), encoders={"audio": EncoderRow(outlet="output", mask="mel_mask")})
    ear, found = resolve_row(model, row).encoders["audio"], resolve(model).encoders["audio"]
    assert ear.outlet is ear.tower is found.tower is model.model.audio_tower
    assert found.outlet is ear.projector is model.model.multi_modal_projector
    assert ear.mask == found.mask == "feature_attention_mask"

    def forward(self, input_ids=None, input_features=None, frames_that_are_real=None):
        raise NotImplementedError

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(PatchError, match=r"takes no feature_attention_mask and no input_features_mask.*padding.*report"):
        resolve_row(model, row)
    with pytest.raises(PatchError, match=r"this Qwen2AudioForConditionalGeneration has no mapper, where its family has one"):
        resolve_row(model, Family(encoders={"audio": EncoderRow(projector="mapper")}))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_audio", "voxtral", *tiny.SEEING])
def test_placeholders_are_found_under_the_spelling_of_each_family(family):
    model = make_encoder_model(family)
    known = {"image": PLACEHOLDER, "video": VIDEO, "audio": PLACEHOLDER}
    assert resolve(model).placeholder_ids == {modality: known[modality] for modality in FAMILIES[family].placeholders}


def test_every_modality_of_the_table_has_a_word_for_its_placeholder():
    assert {f"{modality}_token" for row in FAMILIES.values() for modality in row.placeholders} <= set(SETTINGS)


def test_a_decoder_that_is_not_where_the_row_says_is_an_error():
    model = tiny.make_model("qwen2")
    assert resolve_row(model, Family(decoder="model")).decoder is model.model
    with pytest.raises(PatchError, match="Qwen2ForCausalLM has no text.model, where its family has one"):
        resolve_row(model, Family(decoder="text.model"))


def test_a_placeholder_that_the_configuration_lacks_is_an_error_and_no_guess():
    model = make_encoder_model("voxtral")
    model.config.audio_token_id = None
    with pytest.raises(PatchError, match=r"VoxtralConfig has no audio_token_id and no audio_token_index.*set it there"):
        resolve(model)


def test_a_value_that_is_not_there_is_named_in_all_its_spellings():
    with pytest.raises(PatchError, match=r"SimpleNamespace has no qk_head_dim and no head_dim, .*'head size'.*transformers 5\."):
        setting(SimpleNamespace(), "head_size")


@pytest.mark.parametrize("family", [*tiny.SEEING, "llava", "whisper"])
def test_the_size_of_an_encoders_feature_is_not_that_of_the_language_model(family):
    (encoder,) = resolve(make_encoder_model(family)).encoders.values()
    assert encoder.layer_size == 16


def test_the_windows_of_a_tower_are_known():
    assert pictures.window_of(resolve(tiny.make_model("qwen2_5_vl")).tower) == (16, tiny.PATCH)


def test_the_end_is_what_generate_is_told_before_what_the_model_is_used_to():
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=3))
    assert end_tokens(model, Given({})) == 3
    assert end_tokens(model, Given({"generation_config": SimpleNamespace(eos_token_id=None)})) == 3
    assert end_tokens(model, Given({"generation_config": SimpleNamespace(eos_token_id=[4, 5])})) == [4, 5]
    assert end_tokens(model, Given({"eos_token_id": 6, "generation_config": SimpleNamespace(eos_token_id=4)})) == 6
    assert end_tokens(SimpleNamespace(generation_config=SimpleNamespace()), Given({})) is None


def test_pictures_that_are_counted_otherwise_than_they_came_are_refused():
    given = Given({"batch_num_images": torch.tensor([1, 2]), "image_sizes": torch.tensor([[8, 8], [8, 8]])})
    with pytest.raises(SaliencyError, match="batch_num_images counts 3 pictures, image_sizes has 2"):
        pictures.alone_in_prompt(given, len(pictures.sizes_in(given)))


@pytest.mark.parametrize("came", ["pixel_values", "mm_encoder_outputs"])
def test_sizes_that_did_not_come_are_asked_for_beside_what_came(came):
    given = Given({came: torch.zeros(1, 3, 4, 4) if came == "pixel_values" else {"image": object()}})
    with pytest.raises(SaliencyError, match=f"image_sizes did not come with {came}.*Pass image_sizes as well"):
        pictures.sizes_in(given)
