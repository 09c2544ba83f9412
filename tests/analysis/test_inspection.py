"""`inspect_model`: what structure finds in a folder that holds a `config.json` alone, and why it finds no more."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from kit.crossing import biased, make_crossing_model
from kit.tiny import make_config, spread

from hf_steer import AttentionConfig, Saliency, SaliencyConfig, patch_model
from hf_steer.analysis.described import ranges
from hf_steer.analysis.inspection import inspect_model
from hf_steer.cli.main import main

TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "pad_token_id": 0,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def inspect(tmp_path):
    def look(kind, architecture, **values):
        config = kind if not isinstance(kind, str) else getattr(transformers, kind)(**values)
        config.architectures = [architecture]
        config.save_pretrained(tmp_path)
        return inspect_model(tmp_path)

    return look


def test_a_hybrid_tells_which_layers_attend_and_what_the_others_are(inspect):
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    report = inspect("Lfm2Config", "Lfm2ForCausalLM", **TEXT, layer_types=kinds)
    assert report.can_be_patched
    assert (report.gaze, report.no_gaze, report.row) == ("self", None, False)
    assert report.anatomy == {
        "decoder": "model (Lfm2Model)",
        "layers": "2: model.layers.1.self_attn ... model.layers.3.self_attn (Lfm2Attention)",
        "numbered": "1, 3",
        "heads per layer": "4 query, 2 key/value, of 8 features",
        "bias comes": "as a keyword that the decoder hands on to its attention",
        "other layers": "0, 2: Lfm2ShortConv",
        "boxes, seconds": "text and token statements only",
    }
    assert [(site["layer"], site["path"], site["heads"], site["key_value_heads"]) for site in report.sites] == [
        (1, "model.layers.1.self_attn", 4, 2), (3, "model.layers.3.self_attn", 4, 2),
    ]  # fmt: skip
    lines = str(report).splitlines()
    assert "  found by         structure alone" in lines
    assert "  other layers     0, 2: Lfm2ShortConv" in lines


def test_a_decoder_that_drops_keywords_is_told(inspect):
    report = inspect("StableLmConfig", "StableLmForCausalLM", **TEXT)
    assert report.anatomy["bias comes"].startswith("out of the pass that runs in the thread")
    assert {site["carried"] for site in report.sites} == {"pass"}


def test_attention_that_gets_its_bias_with_its_mask_is_told(inspect):
    report = inspect("BloomConfig", "BloomForCausalLM", vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    assert report.gaze == "self"
    assert report.anatomy["bias comes"].startswith("with the mask that its attention is called with")
    assert "  self   layer   1  transformer.h.1.self_attention  BloomAttention, 4 query, 4 key/value, by mask" in report.listed()


def test_attention_to_an_encoder_is_told_beside_that_to_the_prompt(inspect):
    report = inspect("BartConfig", "BartForConditionalGeneration", **BART)
    assert report.gaze == "self, cross"
    assert report.anatomy["decoder"] == "model.decoder (BartDecoder)"
    assert report.anatomy["cross-attention"].startswith("2: model.decoder.layers.0.encoder_attn ... ")
    assert [site["attends"] for site in report.sites] == ["self", "self", "cross", "cross"]
    assert "  cross  layer   1  model.decoder.layers.1.encoder_attn  BartAttention, 4 query" in report.listed()


def test_places_among_what_an_encoder_hands_on_are_told(inspect):
    report = inspect(make_crossing_model("mllama").config, "MllamaForConditionalGeneration")
    assert report.anatomy["boxes, seconds"] == "the encoder's image positions by layout 'mllama'"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_row_says_where_tokens_lie_and_where_aligners_go(inspect, family):
    config = make_config(family)
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    report = inspect(config, f"{names[family]}ForConditionalGeneration")
    assert report.row
    assert report.anatomy["boxes, seconds"] == "image, video tokens by layout 'qwen'"
    assert report.anatomy["image projector"].startswith("model.visual.merger (")
    assert report.anatomy["image aligners"] == "at output, layers, projector"


@pytest.mark.parametrize(
    ("kind", "architecture", "values", "reason"),
    [
        ("MambaConfig", "MambaForCausalLM", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2},
         "MambaModel has no attention to steer"),
        ("RwkvConfig", "RwkvForCausalLM", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2},
         "what it calls attention carries what came before in a state"),
    ],
)  # fmt: skip
def test_what_cannot_be_steered_is_told_with_the_reason(inspect, kind, architecture, values, reason, tmp_path, capsys):
    report = inspect(kind, architecture, **values)
    assert not report.can_be_patched
    assert (report.gaze, report.sites) == (None, ())
    assert reason in report.reason
    assert f"can be patched   no: {report.reason}" in str(report)
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(dataclasses.asdict(report)))


def test_one_that_takes_aligners_alone_is_told(inspect):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 32}
    report = inspect("Wav2Vec2Config", "Wav2Vec2ForCTC", **small)
    assert report.can_be_patched
    assert report.gaze is None
    assert "  gaze             no: a gaze cannot be put into this 'wav2vec2' model: " in str(report)
    assert report.anatomy["audio aligners"] == "at output, layers"


def test_every_attention_is_listed_where_it_is_asked_for(inspect, tmp_path, capsys):
    inspect("Qwen2Config", "Qwen2ForCausalLM", **TEXT)
    assert main(["inspect", str(tmp_path)]) == 0
    short = capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--sites"]) == 0
    long = capsys.readouterr().out
    assert long.startswith(short)
    assert [line.split()[2] for line in long.removeprefix(short).splitlines()] == ["0", "1", "2", "3"]


def test_runs_of_numbers_are_said_short():
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
    assert ranges([]) == ""


def test_an_encoder_that_takes_a_gaze_can_be_patched_and_is_steered(inspect, tmp_path, capsys):
    """BERT reads its prompt both ways; every word of it is a key."""
    values = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    assert inspect("BertConfig", "BertModel", **values).gaze == "self"
    assert main(["inspect", str(tmp_path)]) == 0
    assert "can be patched   yes" in capsys.readouterr().out
    torch.manual_seed(0)
    model = transformers.BertModel._from_config(transformers.BertConfig(**values), attn_implementation="eager").eval()
    spread(model, 0)
    ids, scores = torch.arange(14).view(2, 7) + 5, torch.randn(2, 7)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    with biased(model, 1.5 * (scores * mask)[:, None].expand(-1, 4, -1), modules=("self",)) as (twin, _), torch.no_grad():
        expected = twin(input_ids=ids, attention_mask=mask).last_hidden_state
    patch_model(model, AttentionConfig(strength=1.5, saliency=SaliencyConfig(source=None, normalize="none")))
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, saliency=Saliency.from_tokens(scores)).last_hidden_state
        plain = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=0.1)


def test_an_encoder_that_takes_neither_gaze_nor_aligner_ends_with_an_error(inspect, tmp_path, capsys):
    report = inspect("DistilBertConfig", "DistilBertModel", vocab_size=96, dim=32, n_layers=2, n_heads=4, hidden_dim=37)
    assert (report.can_be_patched, report.gaze) == (False, None)
    assert main(["inspect", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "can be patched   no: this DistilBertModel cannot be steered" in told
    assert "boxes, seconds   no attention to steer by them" in told
