"""A `generate` in which nothing is to be steered never raises, whatever else its callers do inside it or with its cache."""

from __future__ import annotations

import pytest
import torch
import transformers
from kit.asking import cache_for, generate, plain_generate, prompt, steer, steered, with_cache
from kit.tiny import make_config, make_prompt
from transformers import LogitsProcessor, LogitsProcessorList

from hf_steer import patch_model


class Calls(LogitsProcessor):
    """Something that runs beside every step."""

    def __init__(self, call):
        self.call = call

    def __call__(self, input_ids, scores):
        self.call()
        return scores


def words(family, tokens, seed=0):
    return make_prompt(family, [[tokens]], seed=seed)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_processor_may_read_text_of_its_own(family, steps):
    model, inputs, other = steered(family), words(family, 9), words(family, 5, seed=3)

    def read():
        cache = cache_for(model)
        model(**other, **with_cache(model, cache))
        for _ in range(steps - 1):
            model(input_ids=torch.tensor([[5]]), **with_cache(model, cache))

    expected = plain_generate(model, inputs)
    assert torch.equal(generate(model, inputs, logits_processor=LogitsProcessorList([Calls(read)])), expected)


def test_a_generate_of_ones_own_may_run_no_pass():
    model, inputs = steered(), prompt()
    found = model.generate(**inputs, max_new_tokens=2, custom_generate=lambda model, input_ids, **_: input_ids)
    assert torch.equal(found, inputs["input_ids"])


def test_a_generate_of_ones_own_may_be_a_generator():
    model, inputs = steered(), prompt()

    def stream(model, input_ids, **_):
        with torch.no_grad():
            yield model(input_ids).logits

    with torch.no_grad():
        expected = model(**inputs).logits
    (found,) = model.generate(**inputs, max_new_tokens=2, custom_generate=stream)
    torch.testing.assert_close(found, expected)


def test_rows_that_were_dropped_by_hand():
    model, inputs = steered(), prompt(rows=2)
    cache, whole = cache_for(model), cache_for(model)
    step = torch.tensor([[5]])
    with torch.no_grad():
        model(**inputs, **with_cache(model, cache))
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:1], layer.values[:1]
        model(**{name: value[:1] for name, value in inputs.items()}, **with_cache(model, whole))
        found, expected = (model(input_ids=step, **with_cache(model, own)).logits for own in (cache, whole))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_labels_of_a_classifier():
    config = make_config("qwen2")
    config.num_labels, config.pad_token_id = 3, 0
    model, inputs = transformers.Qwen2ForSequenceClassification(config).eval(), prompt(rows=2)
    labels = torch.tensor([0, 2])
    expected = model(**inputs, labels=labels).loss
    assert torch.equal(patch_model(model, steer())(**inputs, labels=labels).loss, expected)
