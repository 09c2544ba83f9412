"""`hf-steer saliency` of a text and of sounds: token by token, moment by moment."""

from __future__ import annotations

import json

import pytest
import torch
from kit.crossing import make_crossing_model
from kit.marked import tone
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperFeatureExtractor

from hf_steer import ConfigError
from hf_steer.analysis.asked import Reader
from hf_steer.analysis.asked.wav import read_wav
from hf_steer.analysis.stretches import see_sound, see_text
from hf_steer.cli import main
from hf_steer.compose import StackingProcessor
from hf_steer.embedded import embedded_model_dir

FOLDER = embedded_model_dir().parent / "tiny_r1_text"
PROMPT = "i hear seven and two . which number is the first ?"


@pytest.fixture(scope="module")
def reader():
    model = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager").eval()
    return Reader(AutoTokenizer.from_pretrained(FOLDER), model)


@pytest.mark.parametrize("heads", [None, {1: (0, 2)}])
def test_attention_and_gradient_of_a_text_are_those_of_plain_passes(heads, reader):
    model = reader.model
    names, found = see_text(model, reader, PROMPT, sources=None, heads=heads, answer="7")
    ids = torch.tensor([reader.ids(reader.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False,
                                                                         add_generation_prompt=True))])  # fmt: skip
    assert names == tuple(reader.tokenizer.decode([own]) for own in ids[0].tolist())
    with torch.no_grad():
        weights = torch.stack(model(input_ids=ids, output_attentions=True).attentions)[:, 0, :, -1]
    wanted = weights.flatten(0, 1).mean(0) if heads is None else weights[1, [0, 2]].mean(0)
    torch.testing.assert_close(found["decoder_attention"], wanted)
    (token,) = reader.ids("7")
    embeds = model.get_input_embeddings()(ids).detach()
    step, slopes = 1e-2, []
    for place in range(ids.shape[1]):  # gradient × input: how the logit changes when an embedding grows by a share of itself
        grown = torch.stack([embeds[0], embeds[0]])
        grown[0, place] *= 1 + step
        grown[1, place] *= 1 - step
        with torch.no_grad():
            logits = model(inputs_embeds=grown).logits[:, -1, token]
        slopes.append(float(logits[0] - logits[1]) / (2 * step))
    torch.testing.assert_close(found["gradient"], torch.tensor(slopes), rtol=0.02, atol=0.02)


def test_moments_of_a_sound_that_is_read_across(reader, tmp_path):
    tone(tmp_path / "tone.wav", seconds=0.5)
    model = make_crossing_model("whisper", "eager")
    processor = StackingProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=1), reader.tokenizer)
    own = Reader(processor, model)
    names, found = see_sound(model, own, tmp_path / "tone.wav", "", sources=None, heads={0: (1,), 2: (0, 3)}, answer=None)
    assert names[0] == "0.00 s"
    assert names[-1] == "0.48 s"
    assert len(names) == len(found["decoder_attention"]) == 25  # half of the window of 50 positions
    features = processor.feature_extractor(read_wav(tmp_path / "tone.wav", 16000), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        weights = model(**features, decoder_input_ids=torch.tensor([[3]]), output_attentions=True).cross_attentions
    wanted = torch.stack([weights[layer][0, head, -1] for layer, head in ((0, 1), (2, 0), (2, 3))]).mean(0)
    torch.testing.assert_close(found["decoder_attention"], wanted[:25])
    with pytest.raises(ConfigError, match="gradient says nothing of what an encoder hands on"):
        see_sound(model, own, tmp_path / "tone.wav", "", sources=("gradient",), heads=None, answer=None)


def test_the_command_looks_at_a_prompt_alone(tmp_path, capsys):
    words = ["saliency", "--model", str(FOLDER), "--prompt", PROMPT, "--output", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "saliency.json").read_text()) == report
    assert set(report["scores"]) == {"decoder_attention", "gradient"}
    assert sum(report["scores"]["decoder_attention"]) == pytest.approx(1, abs=1e-4)
    assert len(report["names"]) == len(report["scores"]["gradient"])
    assert (tmp_path / "saliency.png").stat().st_size > 5000
    assert main([*words, "--sources", "gradient", "--heads", '{"1": [0]}']) == 0
    assert "looks most at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the embedded model looks at pictures; name one, or a model of your own"),
        (["--model", str(FOLDER), "--sources", "feature_norm"], "--sources: feature_norm says nothing of a text; those that do"),
        (["--model", str(FOLDER), "--blocks", "1"], "--blocks is for pictures"),
        (["--model", str(FOLDER), "--heads", '{"9": [0]}'], "layer 9 is not there"),
        (["--model", str(FOLDER), "x.wav"], "takes no sounds"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(words, message, capsys, tmp_path):
    assert main(["saliency", *words, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
