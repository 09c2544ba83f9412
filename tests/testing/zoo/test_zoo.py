"""Tiny models of every architecture: small, far from uniform attention, the same for the same seed, with inputs that they take."""

from __future__ import annotations

import pytest
import torch

from hf_steer import ConfigError
from hf_steer.testing.biased import AttentionCalls
from hf_steer.testing.zoo import architectures, tiny_config, tiny_inputs, tiny_model
from hf_steer.testing.zoo.inputs import PADDING, ROWS, TOKENS
from hf_steer.testing.zoo.models import MOST_PARAMETERS, START
from hf_steer.testing.zoo.prompts import beginning, mask_of, next_word, prompt_name
from hf_steer.testing.zoo.shrinking import TokenNumbers, kept_layers, shrink
from hf_steer.testing.zoo.sizes import FEATURES, HEADS, KEY_HEADS, WORDS

SOME = ("llama", "qwen2_vl", "gemma3", "whisper", "bart", "lfm2", "deepseek_v3", "gpt_neo")


def test_every_architecture_is_listed_once():
    names = [(one.model_type, one.class_name) for one in architectures()]
    assert len(names) == len(set(names)) > 300
    assert {"image", "speech", "multimodal", "seq2seq", "causal", "ctc"} <= {one.kind for one in architectures()}
    barts = {one.class_name for one in architectures() if one.model_type == "bart"}
    assert barts == {"BartForCausalLM", "BartForConditionalGeneration"}


@pytest.mark.parametrize("model_type", SOME)
def test_models_are_tiny_and_take_their_inputs(model_type):
    model = tiny_model(model_type)
    assert sum(weight.numel() for weight in model.parameters()) < MOST_PARAMETERS / 10
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not model.training
    for padded in (False, True):
        batch = tiny_inputs(model, padded=padded)
        with torch.no_grad():
            logits = model(**batch).logits
        assert logits.shape[:2] == (ROWS, TOKENS)
        assert logits.isfinite().all()
        assert mask_of(model, batch).sum().item() == ROWS * TOKENS - padded * PADDING


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_attention_is_far_from_uniform(model_type):
    model = tiny_model(model_type)
    with torch.no_grad():
        weights = model(**tiny_inputs(model), output_attentions=True).attentions[0]
    last = weights[:, :, -1].clamp(min=1e-9)
    assert (-(last * last.log()).sum(-1)).mean() < 0.9 * torch.tensor(float(TOKENS)).log()


def test_the_seed_decides_and_nothing_else_is_drawn():
    state = torch.get_rng_state()
    one, again, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not any((weight == 0).all() for weight in one.parameters())


def test_the_class_of_a_model_type_that_reads_something_comes_first():
    assert type(tiny_model("whisper")).__name__ == "WhisperForConditionalGeneration"
    assert type(tiny_model("whisper", "WhisperForCausalLM")).__name__ == "WhisperForCausalLM"
    with pytest.raises(ConfigError, match="no WhisperForNothing of type 'whisper'; its classes are"):
        tiny_model("whisper", "WhisperForNothing")
    with pytest.raises(ConfigError, match="no model of type 'wisper'"):
        tiny_model("wisper")


def test_numbers_shrink_and_relations_stay():
    config = tiny_config("qwen3_next") if any(one.model_type == "qwen3_next" for one in architectures()) else tiny_config("lfm2")
    assert len(set(config.layer_types)) == 2  # a hybrid keeps a layer of each kind
    assert config.num_hidden_layers == len(config.layer_types)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (FEATURES, HEADS, KEY_HEADS)
    latent = tiny_config("deepseek_v3")
    assert latent.num_key_value_heads == latent.num_attention_heads


def test_a_layer_of_each_kind_is_kept_and_its_number_follows():
    section = {
        "num_hidden_layers": 6, "layer_types": ["a", "a", "a", "b", "a", "b"], "moe_layers": [0, 1, 2, 3, 4, 5],
        "cross_layers": [1, 4],
        "intermediate_size": [100, 101, 102, 103, 104, 105], "image_token_id": 5000,
        "nested_config": {"image_token_id": 5000},
    }  # fmt: skip
    assert kept_layers(section, 6) == [0, 1, 3]
    small = shrink(section, TokenNumbers())
    assert small["num_hidden_layers"] == 3
    assert small["layer_types"] == ["a", "a", "b"]
    assert small["moe_layers"] == [0, 1, 2]
    assert small["cross_layers"] == [1]
    assert len(small["intermediate_size"]) == 3
    assert small["image_token_id"] == small["nested_config"]["image_token_id"] < WORDS


def test_a_prompt_is_read_at_once_or_word_by_word():
    for model_type in ("llama", "bart"):
        model = tiny_model(model_type)
        batch = tiny_inputs(model)
        with torch.no_grad():
            whole = model(**beginning(model, batch, TOKENS)).logits
            left = model(**beginning(model, batch, TOKENS - 1), use_cache=True)
            cache = next(value for name, value in left.items() if name in ("cache", "past_key_values"))
            last = model(**next_word(model, batch, TOKENS - 1, left, cache)).logits
        torch.testing.assert_close(last, whole[:, -1:], atol=1e-4, rtol=1e-4)
        assert (batch[prompt_name(model)][:, 0] == START).all() == (model_type == "bart")


def test_attention_calls_are_seen_and_biased_for_those_who_are_named():
    model = tiny_model("llama")
    batch = tiny_inputs(model)
    with torch.no_grad(), AttentionCalls() as calls:
        plain = model(**batch).logits
    assert calls.reading(TOKENS) == [layer.self_attn for layer in model.model.layers]
    assert calls.reading(TOKENS + 1) == []
    bias = torch.zeros(ROWS, TOKENS)
    bias[0, 3] = 2.0
    with torch.no_grad(), AttentionCalls("interface", calls.reading(TOKENS), bias):
        changed = model(**batch).logits
    assert torch.equal(changed[1], plain[1])
    assert torch.equal(changed[0, :3], plain[0, :3])  # causal: what comes before does not see it
    assert not torch.equal(changed[0, 3:], plain[0, 3:])
    with torch.no_grad(), AttentionCalls("interface", [], bias):
        assert torch.equal(model(**batch).logits, plain)
