"""What `versions` says of this transformers is so: every fact is tried on models that nothing has patched."""

from __future__ import annotations

import contextlib

import pytest
import torch
from kit.gazing import TOLERANCE, generate, logits, prompt_for
from kit.pictured import KINDS, make_pictured_model, make_tokenizer
from kit.tiny import SEEING, make_model
from kit.tiny_encoders import PLACEHOLDER, make_encoder_inputs, make_encoder_model
from kit.versions import CHUNKS_PICTURES, ENCODES_FIRST, LLAMA4_RUNS, cache_of, cached, generates_from_embeds, repeats_pictures
from transformers import DynamicCache

LLAVA = ("llava", "llava_onevision")
EARS = ("qwen2_audio", "voxtral")


def model_and_inputs(family):
    """Three rows: two pictures or sounds, one, and none; Qwen-VL has a row without a picture in the middle."""
    if family in SEEING:
        return make_model(family), prompt_for(family)
    return make_encoder_model(family), make_encoder_inputs(family)


def close(one, other):
    return torch.allclose(one, other, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"])


def repeats(model, inputs):
    once = generate(model, inputs, max_new_tokens=1)[1][:, 0]
    several = model.generate(
        **inputs, max_new_tokens=1, do_sample=True, num_return_sequences=3, return_dict_in_generate=True, output_logits=True
    )
    return close(several.logits[0], once.repeat_interleave(3, 0))


def test_caches_go_in_and_come_out_by_the_names_that_do_not_warn():
    model = make_model("qwen2")
    inputs = prompt_for("qwen2", rows=[[6]])
    cache = DynamicCache(config=model.config)
    ids = inputs["input_ids"]
    with torch.no_grad():
        output = model(ids[:, :4], **cached(cache))
        assert cache_of(output) is cache
        torch.testing.assert_close(model(ids[:, 4:], **cached(cache)).logits, logits(model, inputs)[:, 4:], **TOLERANCE)
    kept = DynamicCache(config=model.config)
    output = model.generate(ids, **cached(kept), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert cache_of(output) is kept
    assert kept.get_seq_length() == 7


@pytest.mark.parametrize("family", [*SEEING, *LLAVA])
def test_several_pictures_of_a_row_reach_its_copies_in_these_versions_only(family):
    assert repeats(*model_and_inputs(family)) == repeats_pictures(family)


def test_llama_4_runs_in_all_but_one_version():
    kind = KINDS["llama4"]
    model = make_pictured_model(kind, make_tokenizer(kind))
    failing = contextlib.nullcontext() if LLAMA4_RUNS else pytest.raises(AttributeError, match="has no attribute 'image_outputs'")
    with torch.no_grad(), failing:
        model(input_ids=torch.tensor([[3, 4, 5]]))


def test_several_sounds_of_a_row_reach_its_copies_in_no_version():
    assert not repeats(*model_and_inputs("qwen2_audio"))


@pytest.mark.parametrize("family", [*SEEING, *LLAVA])
def test_prompts_with_pictures_can_be_cut_into_chunks_in_these_versions_only(family):
    model, inputs = model_and_inputs(family)
    whole = generate(model, inputs)[1]
    try:
        same = close(generate(model, inputs, prefill_chunk_size=5)[1], whole)
    except RuntimeError:  # 5.14 to 5.18, Qwen-VL: rotary positions of no tokens
        same = False
    assert same == CHUNKS_PICTURES


@pytest.mark.parametrize("family", ["qwen2", *SEEING, *LLAVA, *EARS])
def test_embeddings_can_be_generated_from_where_the_signature_says_so(family):
    model = make_model(family) if family in ("qwen2", *SEEING) else make_encoder_model(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert PLACEHOLDER not in ids
    embeds = {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "attention_mask": torch.ones_like(ids)}
    if generates_from_embeds(model):
        expected = generate(model, {"input_ids": ids, "attention_mask": embeds["attention_mask"]})[1]
        torch.testing.assert_close(generate(model, embeds)[1], expected)
    else:
        with pytest.raises(ValueError, match="doesn't have its forwarding implemented"):
            generate(model, embeds)


def test_pictures_that_the_caller_encoded_are_taken_in_these_versions_only():
    model, inputs = model_and_inputs("llava")
    expected = logits(model, inputs)
    with torch.no_grad():
        encoded = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    taken = close(logits(model, inputs, mm_encoder_outputs={"image": encoded}), expected)
    assert taken == ENCODES_FIRST  # before, they were dropped without a word
