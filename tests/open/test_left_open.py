"""What a configuration leaves open stays what was said, through turns, single-token chunks, other patches and measurements."""

from __future__ import annotations

import math

import pytest
import torch
from kit.asking import cache_for, plain_logits, prompt, with_cache
from kit.tiny import make_model, make_prompt

from hf_steer import (
    AttentionConfig,
    Saliency,
    SaliencyConfig,
    SteerConfig,
    patch_model,
    trace_steering,
    unpatch_model,
    use_saliency,
    use_strength,
    verify,
)
from hf_steer.analysis import attention_metrics
from hf_steer.config.manners import MANNERS
from hf_steer.errors import SaliencyError

pytestmark = pytest.mark.usefixtures("_without_gradients")


@pytest.fixture
def _without_gradients():
    with torch.no_grad():
        yield


def told(**attention) -> AttentionConfig:
    """Steered only by what is said."""
    return AttentionConfig(**{"saliency": SaliencyConfig(source=None), **attention})


def span(inputs, score=1.0) -> Saliency:
    scores = torch.zeros(inputs["input_ids"].shape)
    scores[:, 3:5] = score
    return Saliency.from_tokens(scores)


def box() -> Saliency:
    return Saliency.from_boxes((0, 0, 9, 9), (42, 56))


def pictured():
    return make_prompt("qwen2_vl", [[3, ("image", 4, 3), 4]])


def next_turn(model, said, inputs, config=None) -> torch.Tensor:
    """Logits of a second turn that says nothing, after a first one that does; patched anew between them where asked."""
    cache = with_cache(model, cache_for(model))
    model(**inputs, saliency=said, **cache)
    if config is not None:
        patch_model(unpatch_model(model), config)
    more = 1 if config is not None else 5
    return model(input_ids=torch.arange(7, 7 + more)[None], **cache).logits


def test_a_turn_that_says_nothing_leaves_the_reading_of_its_prompt_alone_as_the_span_before_it_did():
    inputs = prompt(tokens=9)
    found = [next_turn(patch_model(make_model("qwen2"), own), span(inputs), inputs) for own in (told(), told().spelled("tokens"))]
    torch.testing.assert_close(*found)


def test_a_prompt_read_token_by_token_into_a_static_cache_is_left_alone():
    inputs = prompt(tokens=9)
    model = patch_model(make_model("qwen2"), told())
    how = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = [
        torch.stack(model.generate(**inputs, saliency=span(inputs), cache_implementation="static", **how, **chunks).logits)
        for chunks in ({}, {"prefill_chunk_size": 1})
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("first", "then"), [("auto", 3.0), (3.0, "auto")])
def test_a_cache_that_goes_on_under_another_configuration_is_steered_as_hard_as_that_says(first, then):
    def of(strength) -> AttentionConfig:
        return told(strength=strength, queries="generated")  # so that both leave the same keys

    inputs, whole = pictured(), of(then)
    found = next_turn(patch_model(make_model("qwen2_vl"), of(first)), box(), inputs, whole)
    expected = next_turn(patch_model(make_model("qwen2_vl"), whole), box(), inputs, whole)
    # the first turn's last query was steered otherwise, and its keys are in the cache: the bias of the step is what must agree
    other = next_turn(patch_model(make_model("qwen2_vl"), of(first)), box(), inputs, of(30.0 if then == 3.0 else 1.0))
    assert (found - expected).abs().max() < 0.3 * (other - expected).abs().max()


def test_a_trace_tells_the_strength_that_what_was_said_has():
    model, inputs = patch_model(make_model("qwen2_vl"), told()), pictured()
    with trace_steering(model) as trace:
        model.generate(**inputs, saliency=box(), max_new_tokens=2)
    assert trace.steps()[0].strength == MANNERS["region"].strength
    with trace_steering(model) as trace, use_strength(model, 2.5):
        model.generate(**inputs, saliency=box(), max_new_tokens=2)
    assert trace.steps()[0].strength == 2.5
    patch_model(unpatch_model(model), told(share=0.5))
    with trace_steering(model) as trace:
        model.generate(**inputs, saliency=box(), max_new_tokens=2)
    assert math.isnan(trace.steps()[0].strength)


def test_the_share_that_is_kept_is_measured():
    inputs = prompt(tokens=9)
    model, said = patch_model(make_model("qwen2"), told(share=0.6, queries="all")), span(inputs)
    where = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    where[:, 3:5] = True
    last = torch.zeros_like(where)
    last[:, -1] = True
    with use_saliency(model, said):
        found = attention_metrics(model, inputs, span=where, queries=last)
    assert (found.steered_span_mass > 0.6 - 1e-3).all()
    assert (found.span_mass < 0.6).any()


@pytest.mark.parametrize("normalize", ["auto", "none", "zscore"])
def test_a_share_points_at_what_has_more_than_half_of_the_largest_score(normalize):
    inputs, saliency = prompt(tokens=9), SaliencyConfig(source=None, normalize=normalize)
    model = patch_model(make_model("qwen2"), told(share=0.5, saliency=saliency, queries="all"))
    full = model(**inputs, saliency=span(inputs)).logits
    torch.testing.assert_close(model(**inputs, saliency=span(inputs, 0.1)).logits, full)
    assert not torch.allclose(full, plain_logits(model, inputs), atol=0.1)


def test_a_share_cannot_turn_the_gaze_away_and_says_so():
    inputs = prompt(tokens=9)
    model = patch_model(make_model("qwen2"), told(share=0.5))
    with pytest.raises(SaliencyError, match="no score of a row is"):
        model(**inputs, saliency=span(inputs, -1.0))


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_a_whole_model_compiles_with_the_defaults(family):
    model, inputs = patch_model(make_model(family), told()), prompt(tokens=9)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with use_saliency(model, span(inputs)):
        expected = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("queries", ["auto", "all"])
def test_a_share_is_verified_as_far_as_it_can_be_and_not_called_broken(queries):
    inputs = prompt(tokens=9)
    config = SteerConfig(attention=told(share=0.5, queries=queries))
    report = verify(make_model("qwen2"), inputs, config=config, saliency=span(inputs))
    assert "BROKEN" not in str(report)
    assert "has no strength that could be 0" in str(report)
