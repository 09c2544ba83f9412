"""Sliding windows, values of another size than keys, softcapped logits and sinks: steered exactly, or refused."""

from __future__ import annotations

import pytest
import torch
from kit.gazing import TOLERANCE, generate
from kit.tiny import HEADS, UNCOMMON, make_model, make_prompt

from hf_steer import (
    AttentionConfig,
    Saliency,
    SaliencyConfig,
    SteerConfig,
    disable_steering,
    patch_model,
    unpatch_model,
    use_saliency,
)
from hf_steer.analysis import attention_metrics
from hf_steer.attention import backends
from hf_steer.errors import SteerError

CASES = [(family, implementation) for family, implementations in UNCOMMON.items() for implementation in implementations]
every = pytest.mark.parametrize(("family", "implementation"), CASES)
WINDOW = 7
TOKENS = 13
LOWEST = torch.finfo(torch.float32).min
pytestmark = pytest.mark.filterwarnings("ignore:The explicitly set RoPE scaling factor")


def steer(*, backend="auto", strength=2.0):
    saliency = SaliencyConfig(source=None, normalize="none")
    return SteerConfig(attention=AttentionConfig(strength=strength, saliency=saliency, backend=backend, queries="all"))


def biased_masks(family, bias):
    """The causal masks of both kinds of layers, with the bias in them."""
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    window = causal & torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1 - WINDOW)
    full, sliding = (torch.where(allowed, bias, LOWEST) for allowed in (causal, window))
    if family in ("gemma2", "gpt_oss"):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding if family == "mistral" else full


def example():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 80, (2, TOKENS), generator=generator)
    return ids, torch.randn(2, TOKENS, generator=generator)


@torch.no_grad()
@every
@pytest.mark.parametrize("backend", ["auto", "folded", "mask"])
def test_one_pass_equals_the_unpatched_model_with_the_bias_in_its_mask(family, implementation, backend):
    model = make_model(family, implementation)
    ids, scores = example()
    bias = (2.0 * scores)[:, None, None].expand(-1, HEADS, TOKENS, -1)
    plain, expected = model(ids).logits, model(ids, attention_mask=biased_masks(family, bias)).logits
    patch_model(model, steer(backend=backend))
    with use_saliency(model, Saliency.from_tokens(scores)):
        if family == "gemma2" and backend == "folded":
            backends.say_once.cache_clear()
            with pytest.warns(match="'folded' gives way to 'mask', with the same result: softcapped logits would bend"):
                steered = model(ids).logits
        else:
            steered = model(ids).logits
    torch.testing.assert_close(steered, expected, **TOLERANCE)
    assert (steered - plain).abs().max() > 0.5
    with disable_steering(model):
        assert torch.equal(model(ids).logits, plain)
    unpatch_model(model)
    assert torch.equal(model(ids).logits, plain)


@every
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_and_decode_equal_one_pass(family, implementation, cache):
    model = patch_model(make_model(family, implementation), steer())
    inputs = make_prompt("qwen2", [[13], [8]], padding="left")
    inputs["input_ids"] = torch.where(inputs["attention_mask"] > 0, torch.randint(1, 80, inputs["input_ids"].shape), 0)
    said = torch.randn(inputs["input_ids"].shape)
    how = {"cache_implementation": "static"} if cache == "static" else {}
    tokens, logits = generate(model, inputs, Saliency.from_tokens(said), max_new_tokens=6, **how)
    new = tokens.shape[1] - said.shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new - 1), value=1)
    with torch.no_grad(), use_saliency(model, Saliency.from_tokens(torch.nn.functional.pad(said, (0, new - 1)))):
        whole = model(tokens[:, :-1], attention_mask=mask).logits
    torch.testing.assert_close(logits, whole[:, -new:], **TOLERANCE)


@torch.no_grad()
def test_attention_that_goes_to_a_sink_is_not_read_as_if_it_went_to_tokens():
    model = make_model("gpt_oss", "eager")
    ids, scores = example()
    patch_model(model, steer())
    with use_saliency(model, Saliency.from_tokens(scores)), pytest.raises(SteerError, match=r"in heads with sinks \(gpt-oss\)"):
        attention_metrics(model, {"input_ids": ids}, span=None)


@torch.no_grad()
def test_softcapped_attention_is_read_as_the_model_computes_it():
    model = make_model("gemma2", "eager")
    ids, _ = example()
    attentions = model(ids, output_attentions=True).attentions
    entropy = torch.stack([-(weights * weights.clamp(min=1e-30).log()).sum(-1).mean((0, 2)) for weights in attentions])
    measured = attention_metrics(model, {"input_ids": ids}, span=None).entropy_nats
    torch.testing.assert_close(measured, entropy, **TOLERANCE)
