"""A transformers pipeline hands `saliency=` on to `generate`: by name, or in its dictionary of generate's arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.asking import generate, look, steered
from kit.words import make_tokenizer
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, ImageTextToTextPipeline, TextGenerationPipeline

from hf_steer import AttentionConfig, Saliency, SteerConfig, disable_steering, patch_model, use_saliency

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_r1_vl"
BOX = (0, 0, 20, 20)
SIZE = (96, 64)


def test_a_text_pipeline_takes_it_by_name():
    model, tokenizer = steered("qwen2"), make_tokenizer()
    model.generation_config.max_length = None
    pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    inputs = tokenizer("w5 w6 w7 w8", return_tensors="pt")
    said = look(inputs)
    expected = tokenizer.decode(generate(model, inputs, said)[0, 4:])
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    plain = pipe("w5 w6 w7 w8", **settings)[0]["generated_text"]
    assert plain.split() != expected.split()
    found = pipe("w5 w6 w7 w8", **settings, saliency=said)[0]["generated_text"]
    assert found.split() == expected.split()
    assert pipe("w5 w6 w7 w8", **settings)[0]["generated_text"] == plain


@pytest.fixture(scope="module")
def seeing():
    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    patch_model(model, SteerConfig(attention=AttentionConfig(strength=8.0)))
    return ImageTextToTextPipeline(model=model, processor=AutoProcessor.from_pretrained(FOLDER)), model


def ask(pipe, **statement):
    words = "<|vision_start|><|image_pad|><|vision_end|>where?"
    settings = {"max_new_tokens": 6, "do_sample": False, **statement}
    picture = Image.linear_gradient("L").convert("RGB").resize(SIZE)
    return pipe(images=picture, text=words, generate_kwargs=settings, return_tensors=True)[0]["generated_token_ids"].tolist()


def test_a_picture_pipeline_takes_it_in_its_dictionary(seeing):
    pipe, model = seeing
    said = Saliency.from_boxes(BOX, SIZE)
    with use_saliency(model, said):
        expected = ask(pipe)
    with disable_steering(model):
        plain = ask(pipe)
    assert expected != plain
    assert ask(pipe, saliency=said) == expected
