"""Lines of an examples file about texts, pictures and sounds: what they become, and what is said of those that are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from kit.crossing import make_crossing_model
from kit.marked import tone
from kit.tiny import make_model
from transformers import AutoTokenizer, WhisperFeatureExtractor

from hf_steer import FileError, Saliency, SaliencyError
from hf_steer.analysis.asked import FORMS, read_asked, together
from hf_steer.analysis.asked.wav import read_wav, resampled
from hf_steer.cli.command import EXAMPLES
from hf_steer.compose import StackingProcessor
from hf_steer.embedded import embedded_model_dir

PROMPT = "i hear seven two nine . which number is the first ?"
FOLDER = embedded_model_dir().parent / "tiny_r1_text"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def write(folder, *lines):
    path = folder / "examples.jsonl"
    path.write_text("\n".join(json.dumps(line) if isinstance(line, dict) else line for line in lines))
    return path


def looked_at(asked, tokenizer):
    ids = asked.inputs["input_ids"][0]
    return tokenizer.decode(ids[asked.said.tokens[0].bool()])


@pytest.mark.parametrize(
    ("look", "words"),
    [
        ("two", "two"),
        ("seven two", "seven two"),
        (["seven", "nine"], "seven nine"),
        ([13, 21], "two nine"),
        ([[7, 12], [17, 21]], "seven nine"),
        (["seven", [17, 21]], "seven nine"),
    ],
)
def test_words_and_characters_of_a_prompt_are_looked_at(look, words, tokenizer, tmp_path):
    path = write(tmp_path, {"prompt": PROMPT, "look": look, "answer": "7", "thought": "seven\n</think>\n"})
    (asked,) = read_asked(path, tokenizer)
    assert looked_at(asked, tokenizer) == words
    text = tokenizer.decode(asked.inputs["input_ids"][0])
    assert text.startswith("<|im_start|>")
    assert text.endswith("seven </think>")
    assert tokenizer.decode([asked.answer_token]) == asked.answer == "7"


def test_messages_are_a_conversation_and_characters_are_of_the_last_one(tokenizer, tmp_path):
    turns = [{"role": "system", "content": "okay two"}, {"role": "user", "content": PROMPT}]
    path = write(tmp_path, {"messages": turns, "look": [13, 16]}, "", {"messages": turns, "look": "two", "occurrence": 1})
    for asked in read_asked(path, tokenizer):
        scored = asked.said.tokens[0].nonzero().flatten().tolist()
        assert looked_at(asked, tokenizer) == "two"
        assert len(scored) == 1
        assert scored[0] > 8
        assert asked.answer is None is asked.answer_token


class Spaced:
    """A tokenizer of characters, which has white space apart: the answer's first token would be the space."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        found = {"input_ids": [ord(letter) for letter in text]}
        return {**found, "offset_mapping": [(place, place + 1) for place in range(len(text))]} if return_offsets_mapping else found

    def decode(self, ids, **kwargs):
        return "".join(chr(own) for own in ids)


def test_white_space_before_an_answer_belongs_to_the_prompt(tmp_path):
    path = write(tmp_path, {"prompt": "a: 1. b: 2.", "look": [6, 11], "thought": " It is", "answer": "  2"})
    (asked,) = read_asked(path, Spaced())
    assert Spaced().decode(asked.inputs["input_ids"][0]) == "a: 1. b: 2. It is  "
    assert chr(asked.answer_token) == "2"
    assert asked.said.tokens[0].nonzero().flatten().tolist() == [6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("{", FileError, "line 2: not JSON"),
        ("[1]", FileError, "a line is an object, such as .*; got list"),
        ({"question": "?"}, FileError, r"with one of image, audio, messages, prompt; got \['question'\]"),
        ({"prompt": PROMPT}, FileError, "with prompt, look and, if wanted, answer, thought, occurrence; this one lacks look"),
        ({"prompt": PROMPT, "look": "two", "box": [1]}, FileError, "this one has box"),
        ({"prompt": "", "look": "two"}, FileError, "prompt must be text, and not empty; got ''"),
        ({"prompt": PROMPT, "look": 3}, FileError, "look must be quoted words.*; got 3"),
        ({"prompt": PROMPT, "look": []}, FileError, "look must be quoted words"),
        ({"prompt": PROMPT, "look": [1.5, 2]}, FileError, "look must be quoted words"),
        ({"prompt": PROMPT, "look": "two", "occurrence": "1"}, FileError, "occurrence must be a whole number"),
        ({"messages": ["hi"], "look": "hi"}, FileError, "messages must be a list such as"),
        ({"audio": "x.wav", "seconds": [1]}, FileError, r"seconds must be \[start, end\] in seconds; got \[1\]"),
        ({"prompt": PROMPT, "look": "eight"}, SaliencyError, "line 2: row 0: 'eight' is not in its text"),
        ({"prompt": PROMPT, "look": [40, 60]}, SaliencyError, r"characters \[\[40, 60\]\] are counted in the.* which has 51"),
        ({"prompt": "two two", "look": "two"}, SaliencyError, "'two' is there 2 times; say which"),
        ({"image": "x.png", "question": "?", "box": [0, 0, 1, 1]}, FileError, "x.png' cannot be read as a picture"),
        ({"audio": "x.wav", "seconds": [0, 1]}, FileError, "takes no sounds; name a model that does"),
    ],
)
def test_a_line_that_is_none_is_named_with_what_is_allowed(line, kind, message, tokenizer, tmp_path):
    path = write(tmp_path, {"prompt": PROMPT, "look": "two"}, line)
    with pytest.raises(kind, match=message) as caught:
        read_asked(path, tokenizer)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_a_file_without_lines_or_that_is_not_there_is_refused(tokenizer, tmp_path):
    with pytest.raises(FileError, match="has no lines; give one JSON object a line, such as"):
        read_asked(write(tmp_path, "", " "), tokenizer)
    with pytest.raises(FileError, match="cannot be read"):
        read_asked(tmp_path / "nowhere", tokenizer)


def test_every_form_is_in_the_help_and_its_sample_is_one(tokenizer, tmp_path):
    for name, form in FORMS.items():
        values = json.loads(form.sample)
        assert set(form.needs) <= set(values) <= {*form.needs, *form.takes}
        assert f'{{"{name}": ' in EXAMPLES


@pytest.mark.parametrize(("width", "channels", "rate"), [(2, 1, 16000), (1, 1, 8000), (4, 2, 44100)])
def test_sounds_come_at_the_models_rate(width, channels, rate, tmp_path):
    heard = read_wav(tone(tmp_path / "tone.wav", rate=rate, width=width, channels=channels), 16000)
    wanted = np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
    assert heard.dtype == np.float32
    np.testing.assert_allclose(heard[100:-100], wanted[100:-100], atol=0.02)  # 8 bits


def test_resampling_keeps_what_both_rates_have():
    slow = np.random.default_rng(0).standard_normal(401)
    np.testing.assert_allclose(resampled(resampled(slow, 8000, 24000), 24000, 8000), slow, atol=1e-9)


def test_what_is_no_sound_is_refused(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"nothing")
    for name in ("x.wav", "nowhere.wav"):
        with pytest.raises(FileError, match="cannot be read as a WAV file.*ffmpeg"):
            read_wav(tmp_path / name, 16000)
    tone(tmp_path / "empty.wav", seconds=0)
    with pytest.raises(FileError, match="has 0 samples"):
        read_wav(tmp_path / "empty.wav", 16000)


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_sound_that_is_cut_off_is_refused(lost, tmp_path):
    """Of a whole sample more or less: seconds would fall on silence, or on nothing."""
    whole = tone(tmp_path / "tone.wav").read_bytes()
    (tmp_path / "tone.wav").write_bytes(whole[:-lost])
    with pytest.raises(FileError, match="is cut off: it says that it has 4000 samples, and 3.*Copy it again"):
        read_wav(tmp_path / "tone.wav", 16000)


def test_a_sound_for_a_decoder_that_reads_across_brings_its_first_tokens(tokenizer, tmp_path):
    tone(tmp_path / "tone.wav")
    model = make_crossing_model("whisper")
    processor = StackingProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer)
    path = write(tmp_path, {"audio": "tone.wav", "seconds": [0.1, 0.3], "thought": "seven ", "answer": "two"})
    (asked,) = read_asked(path, processor, model=model)
    words = tokenizer("seven two", add_special_tokens=False).input_ids
    assert asked.inputs["decoder_input_ids"].tolist() == [[3, words[0]]]
    assert asked.answer_token == words[1]
    assert asked.inputs["input_features"].shape == (1, 8, 100)
    assert asked.said.regions[0].paint.spans == ((0.1, 0.3),)
    with pytest.raises(SaliencyError, match=r"line 1: span \(0.1, 0.9\) is empty, negative or outside the sound of 0.5"):
        read_asked(write(tmp_path, {"audio": "tone.wav", "seconds": [0.1, 0.9]}), processor, model=model)


def test_texts_go_together_padded_on_the_left(tokenizer, tmp_path):
    lines = [{"prompt": f"okay {'so ' * number}seven two", "look": "two"} for number in range(5)]
    asked = read_asked(write(tmp_path, *lines), tokenizer)
    groups = together(asked, make_model("llama"), rows=3)
    assert [len(group) for group, _, _ in groups] == [3, 2]
    place = 0
    for group, inputs, statement in groups:
        for row, one in enumerate(group):
            assert one is asked[place]
            real = inputs["attention_mask"][row].bool()
            assert torch.equal(inputs["input_ids"][row, real], one.inputs["input_ids"][0])
            assert torch.equal(statement.tokens[row, real], one.said.tokens[0])
            assert not statement.tokens[row, ~real].any()
            assert real[-1]
            place += 1
    assert isinstance(groups[0][2], Saliency)
