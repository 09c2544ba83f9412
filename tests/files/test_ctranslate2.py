"""The reader of CTranslate2's files, on files that the test writes, and the Whisper that is made of one."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from kit.published import SPECIAL, as_ctranslate2, tiny_whisper, write_published
from kit.real import model_bin, real
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor


def test_arrays_of_every_type_come_back_and_an_alias_is_the_array_it_stands_for():
    random = np.random.default_rng(0)
    values = {
        "a/weight": random.normal(size=(3, 2)).astype(np.float32), "a/bias": random.normal(size=3).astype(np.float16),
        "b/count": np.int16(-7), "b/kind": np.int8([1, -2]), "b/long": np.int32([70000]),
    }  # fmt: skip
    found = real("ctranslate2").read_model(model_bin(values, [("c/weight", "a/weight")], name="Odd"))
    assert (found.name, found.revision) == ("Odd", 3)
    assert found.variables.keys() == {*values, "c/weight"}
    for name, value in values.items():
        np.testing.assert_array_equal(found.variables[name], value)
        assert found.variables[name].dtype == value.dtype
    assert found.variables["c/weight"] is found.variables["a/weight"]


def test_bfloat16_comes_as_the_float32_that_it_stands_for():
    exact = torch.tensor([1.5, -0.25, 3e38])
    bits = exact.to(torch.bfloat16).view(torch.int16).numpy()
    content = model_bin({"a": bits}, types=("float32", "int8", "x", "int32", "float16", "int16"))
    np.testing.assert_array_equal(real("ctranslate2").read_model(content).variables["a"], exact.to(torch.bfloat16).float().numpy())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda content: content[:-9], "a part is missing"),
        (lambda content: content + b"\0", "1 bytes are left over"),
        (lambda content: b"\x05" + content[1:], "format version 5, and only 6"),
        (lambda content: content.replace(b"weight\0", b"weight!"), "a name ends without its zero"),
    ],
)
def test_a_file_that_is_not_whole_or_of_another_kind_is_refused(spoil, says):
    reader = real("ctranslate2")
    with pytest.raises(reader.FormatError, match=re.escape(says)):
        reader.read_model(spoil(model_bin({"a/weight": np.zeros((2, 2), np.float32)})))


@pytest.fixture
def published(tmp_path):
    (tmp_path / "published").mkdir()
    write_published(tmp_path / "published")
    (tmp_path / "plain").mkdir()
    return tmp_path / "published"


def converted(published, variables, aliases=()):
    content = model_bin(variables, aliases)
    real("whisper_weights").save_whisper(real("ctranslate2").read_model(content), published, published.parent / "plain")
    return published.parent / "plain"


def test_a_whisper_comes_out_as_it_went_in(published):
    model = tiny_whisper()
    folder = converted(published, as_ctranslate2(model), [("decoder/projection/weight", "decoder/embeddings/weight")])
    found = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()
    processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
    inputs = {"input_features": torch.randn(1, 8, 3000), "decoder_input_ids": torch.tensor([[5, 6, 9, 13, 0]])}
    with torch.no_grad():
        torch.testing.assert_close(found(**inputs).logits, model(**inputs).logits)
    settings = found.generation_config
    assert (settings.suppress_tokens, settings.begin_suppress_tokens, settings.no_timestamps_token_id) == ([1], [2, 4], 13)
    assert (settings.prev_sot_token_id, settings.alignment_heads) == (11, [[0, 1]])
    tokens = processor.tokenizer.convert_ids_to_tokens([13, 14, 15, 14 + 1500])
    assert tokens == ["<|notimestamps|>", "<|0.00|>", "<|0.02|>", "<|30.00|>"]
    assert processor.feature_extractor.feature_size == 8
    sound = processor(np.zeros(16_000, np.float32), sampling_rate=16_000, return_tensors="pt")
    assert sound.input_features.shape == (1, 8, 3000)


def test_what_is_not_whispers_is_refused(published):
    variables, error = as_ctranslate2(tiny_whisper()), real("ctranslate2").FormatError
    key = "decoder/layer_0/attention/linear_1/bias"
    with pytest.raises(error, match="the keys of decoder/layer_0/attention/linear_1 have a bias"):
        converted(published, {**variables, key: variables[key] + 1})
    with pytest.raises(error, match="arrays missing: .'encoder/conv1/bias'"):
        converted(published, {name: value for name, value in variables.items() if name != "encoder/conv1/bias"})
    with pytest.raises(error, match="not known: .'decoder/odd/weight'"):
        converted(published, {**variables, "decoder/odd/weight": np.zeros(2, np.float32)})
    with pytest.raises(error, match="whole numbers with scales"):
        converted(published, {**variables, "decoder/layer_0/ffn/linear_0/weight_scale": np.ones(20, np.float32)})
    with pytest.raises(error, match="a TransformerSpec, and only WhisperSpec"):
        real("whisper_weights").save_whisper(real("ctranslate2").Model("TransformerSpec", 1, {}), published, published.parent)


@pytest.mark.parametrize(("vocabulary", "several"), [(51864, False), (51865, True)])
def test_a_whisper_of_several_languages_knows_them_and_its_tasks(vocabulary, several):
    ids = {name: 50257 + place for place, name in enumerate(SPECIAL)}
    config = WhisperConfig(vocab_size=vocabulary, max_target_positions=448)
    published = {"suppress_ids": [1], "suppress_ids_begin": [2], "alignment_heads": [[0, 1]]}
    found = real("whisper_weights").generation_of(config, ids, published)
    assert found.is_multilingual is several
    if several:
        assert found.lang_to_id == {"<|en|>": 50259, "<|de|>": 50260}
        assert found.task_to_id == {"translate": 50261, "transcribe": 50262}
        assert found.task == "transcribe"
    else:
        assert not hasattr(found, "lang_to_id")
