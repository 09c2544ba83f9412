"""`hf-steer verify`: a table, a verdict, an exit status, and a model that is loaded as it lies there."""

from __future__ import annotations

import json

import pytest
import torch
from kit.gazing import steer
from kit.tiny import make_model, settle_generation, spread
from PIL import Image
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import hf_steer
from hf_steer import SteerConfig
from hf_steer.cli.main import main
from hf_steer.cli.verify import CHECKS, DESCRIPTION
from hf_steer.embedded import embedded_model_dir
from hf_steer.patching.gaze.biases import BiasMaker
from hf_steer.values import HeadBias
from hf_steer.verify import BUDGET, PROMISES

TEXT = embedded_model_dir().parent / "tiny_r1_text"


def told(capsys):
    return json.loads(capsys.readouterr().out)


def test_help_names_every_promise_and_the_budget():
    assert tuple(PROMISES) == CHECKS
    for name, promise in PROMISES.items():
        assert f"  {name:<10} {promise.says}\n" in DESCRIPTION
    assert f"It takes {BUDGET} forward passes at most" in DESCRIPTION


def test_the_embedded_model_keeps_all_that_is_promised(capsys):
    assert main(["verify"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith("Qwen2VLForConditionalGeneration: qwen2_vl, sdpa, float32 on cpu; a patch made for this; ")
    assert [line.split()[0] for line in lines[1:11]] == ["holds"] * 10
    assert lines[-1] == "All 10 promises hold for hf_steer on this model."
    assert said.err == ""


def test_json_is_one_object_and_nothing_else(capsys, tmp_path):
    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "red.png")
    words = ["--image", str(tmp_path / "red.png"), "--prompt", "Which digit is left?", "--checks", "identity,no leak"]
    assert main(["verify", *words, "--json"]) == 0
    report = told(capsys)
    assert [check["name"] for check in report["checks"]] == ["identity", "no leak"]
    assert report["holds"] is True
    assert 0 < report["passes"] <= report["budget"]


def test_a_text_model_is_verified_on_its_tokenizers_words(capsys):
    assert main(["verify", str(TEXT), "--prompt", "A question of some length?", "--checks", "undone,decoding", "--json"]) == 0
    report = told(capsys)
    assert report["family"] == "qwen3"
    assert report["tokens"] > 0


@pytest.fixture
def saved(tmp_path):
    """A model in bfloat16 without a tokenizer, and a steering in another folder."""
    model = make_model("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    hf_steer.patch_model(model, steer("qwen2"))
    hf_steer.save_steering(model, tmp_path / "steering")
    model.save_pretrained(tmp_path / "both")
    return tmp_path


def test_a_model_is_loaded_in_its_type_with_the_steering_that_is_given_or_lies_beside_it(saved, capsys):
    only = ["--checks", "receipt", "--json"]
    assert main(["verify", str(saved / "model"), *only]) == 0
    plain = told(capsys)
    assert (plain["patched"], plain["dtype"]) == (False, "bfloat16")
    for words in ([str(saved / "both")], [str(saved / "model"), "--config", str(saved / "steering")]):
        assert main(["verify", *words, *only]) == 0
        report = told(capsys)
        assert report["patched"] is True
        assert "6 heads in 2 layers" in report["checks"][0]["why"]


def test_a_broken_promise_is_status_1_and_the_verdict_names_it(saved, capsys, monkeypatch):
    every = BiasMaker.every
    monkeypatch.setattr(
        BiasMaker, "every", lambda self: {layer: HeadBias(2 * own.query, own.key) for layer, own in every(self).items()}
    )
    assert main(["verify", str(saved / "model"), "--checks", "identity,receipt"]) == 1
    out = capsys.readouterr().out
    assert "\n  BROKEN     receipt   the heads" in out
    assert out.splitlines()[-1].startswith("Do not rely on hf_steer on this model: 1 of 2 promises are broken (receipt).")


def test_what_is_not_there_is_an_error_in_a_line(saved, capsys, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "black.png")
    for words, said in (
        ([str(tmp_path / "nowhere")], "holds no model configuration that transformers can read"),
        ([str(saved / "model"), "--config", str(saved / "model")], "steer_config.json"),
        ([str(saved / "model"), "--image", str(tmp_path / "black.png")], "is not known to look at pictures; leave --image out"),
        (["--image", str(tmp_path / "none.png")], "none.png"),
        ([str(saved / "model"), "--prompt", "Hm?"], "no tokenizer at"),
        (["--device", "abacus"], "--device must be one that torch can use here"),
    ):
        assert main(["verify", *words]) == 1, words
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert said in lines[0]
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--checks", "identty"])
    assert ended.value.code == 2
    assert "did you mean identity?" in capsys.readouterr().err


def test_a_steering_that_asks_for_nothing_is_an_error(saved, capsys):
    SteerConfig(attention=None).save_pretrained(saved / "nothing")
    assert main(["verify", str(saved / "model"), "--config", str(saved / "nothing")]) == 1
    assert "its patch would do nothing here" in capsys.readouterr().err


def saved_whisper(folder):
    """A Whisper of a second's window."""
    config = WhisperConfig(
        vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=4,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8, max_source_positions=50, max_target_positions=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    spread(model, 0)
    settle_generation(model)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)


def test_a_model_that_only_listens_is_verified_on_drawn_sounds(capsys, tmp_path):
    saved_whisper(tmp_path)
    assert main(["verify", str(tmp_path), "--json"]) == 0
    report = told(capsys)
    assert report["family"] == "whisper"
    passed = {check["name"] for check in report["checks"] if check["passed"]}
    assert passed >= {"identity", "receipt", "backend", "decoding", "beams", "saved", "undone"}
    assert main(["verify", str(tmp_path), "--prompt", "What?"]) != 0
    assert "'whisper' listens and reads no prompt; leave --prompt out" in capsys.readouterr().err
    (tmp_path / "preprocessor_config.json").unlink()
    assert main(["verify", str(tmp_path)]) != 0
    assert "a model that listens needs it. Make the inputs yourself: hf_steer.verify(model, inputs)" in capsys.readouterr().err
