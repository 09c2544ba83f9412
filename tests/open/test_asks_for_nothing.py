"""The other side of the law: where nothing is asked, a patched model never raises and is bit-equal."""

from __future__ import annotations

import pytest
import torch
from kit.asking import cache_for, generate, logits, look, prompt, steered, with_cache
from kit.tiny import make_model, make_prompt
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model, modality_of

from hf_steer import AlignerConfig, Saliency, SteerConfig, patch_model, use_saliency, use_strength

quiet = pytest.mark.parametrize("family", ["qwen2", "llama", "qwen2_vl", "qwen3_vl"])


def embeds_of(model, tokens=7):
    ids = torch.arange(2, 2 + tokens)[None]
    with torch.no_grad():
        return model.get_input_embeddings()(ids).detach()


def pair(family, **attention):
    return steered(family, **attention), make_model(family)


@quiet
def test_embeddings_alone_without_a_statement(family):
    model, bare = pair(family, source=None)
    embeds = embeds_of(bare)
    assert torch.equal(logits(model, {"inputs_embeds": embeds}), logits(bare, {"inputs_embeds": embeds}))
    for how in ({}, {"num_beams": 2}, {"use_cache": False}):
        assert torch.equal(
            generate(model, {"inputs_embeds": embeds}, **how), generate(bare, {"inputs_embeds": embeds}, **how)
        )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_embeddings_alone_of_a_model_with_eyes_that_λ_turns_off(family):
    model, bare = pair(family, strength=0.0)
    embeds = embeds_of(bare)
    assert torch.equal(logits(model, {"inputs_embeds": embeds}), logits(bare, {"inputs_embeds": embeds}))


@quiet
def test_hidden_states_and_attentions_are_still_there(family):
    model, bare = pair(family, source=None)
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        found, expected = (one(ids, output_hidden_states=True) for one in (model, bare))
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))


class Sounding(torch.nn.Module):
    """Token ids of several codebooks per frame are summed, as audio models with `(batch, tokens, codebooks)` do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, ids):
        return self.inner(ids).sum(2) if ids.ndim == 3 else self.inner(ids)


def test_ids_of_three_dimensions():
    model, bare = pair("qwen2", source=None)
    ids = torch.randint(2, 80, (1, 5, 2), generator=torch.Generator().manual_seed(0))
    for one in (model, bare):
        one.set_input_embeddings(Sounding(one.get_input_embeddings()))
    cached = []
    for one in (model, bare):
        cache = cache_for(one)
        passes = [logits(one, {"input_ids": part}, **with_cache(one, cache)) for part in (ids, ids[:, :1])]
        cached.append(torch.cat([logits(one, {"input_ids": ids}), *passes], 1))
    assert torch.equal(*cached)


@quiet
def test_no_strength(family):
    model, bare = pair(family, strength=0.0)
    inputs = prompt(family)
    said = look(inputs)
    assert torch.equal(logits(model, inputs, said), logits(bare, inputs))
    assert torch.equal(generate(model, inputs, said), generate(bare, inputs))
    assert torch.equal(logits(model, inputs, saliency=said), logits(bare, inputs))
    assert torch.equal(generate(model, inputs, saliency=said), generate(bare, inputs))


@quiet
def test_no_strength_for_a_while(family):
    model, bare = pair(family)
    inputs = prompt(family)
    with use_strength(model, 0.0), use_saliency(model, look(inputs)):
        assert torch.equal(logits(model, inputs), logits(bare, inputs))
        assert torch.equal(generate(model, inputs), generate(bare, inputs))


@quiet
@pytest.mark.filterwarnings("ignore:what is pointed at covers")
def test_a_statement_that_says_nothing(family):
    """All zeros, and a constant, which is no preference."""
    model, bare = pair(family, normalize="zscore")
    inputs = prompt(family)
    for scores in (torch.zeros(inputs["input_ids"].shape), torch.full(inputs["input_ids"].shape, 2.5)):
        said = Saliency.from_tokens(scores)
        assert torch.equal(logits(model, inputs, said), logits(bare, inputs))
        assert torch.equal(generate(model, inputs, said), generate(bare, inputs))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_text_alone_for_a_model_with_eyes(family):
    model, bare = pair(family)
    inputs = make_prompt(family, [[6], [4]])
    assert torch.equal(logits(model, inputs), logits(bare, inputs))
    assert torch.equal(generate(model, inputs), generate(bare, inputs))


@pytest.mark.parametrize(("family", "placement", "kind"), [
    ("whisper", "output", "progressive"), ("whisper", "layers", "layer_wise"), ("llava", "projector", "simple"),
    ("llava", "projector", "cross_modal_adapter"), ("qwen2_vl", "output", "hierarchical"), ("qwen2_vl", "projector", "simple"),
])  # fmt: skip
def test_a_fresh_aligner(family, placement, kind):
    options = {"hidden_dim": 16, "num_heads": 4} if kind == "cross_modal_adapter" else {}
    config = AlignerConfig(modality=modality_of(family), placement=placement, kind=kind, **options)
    model, bare = patch_model(make_encoder_model(family), SteerConfig(aligners=(config,))), make_encoder_model(family)
    inputs = make_encoder_inputs(family)
    assert torch.equal(logits(model, inputs), logits(bare, inputs))
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **settings), bare.generate(**inputs, **settings))


def test_an_unsteered_pass_of_any_shape_of_cache():
    model, bare = pair("qwen2", source=None)
    for _ in range(2):
        for one_token in (False, True):
            ids = torch.tensor([[5]]) if one_token else torch.arange(2, 9)[None]
            caches = cache_for(model), cache_for(bare)
            found, expected = (
                [logits(one, {"input_ids": ids}, **with_cache(one, cache)) for _ in range(2)]
                for one, cache in zip((model, bare), caches, strict=True)
            )
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_configuration_of_nothing():
    model, bare = patch_model(make_model("qwen2"), SteerConfig()), make_model("qwen2")
    inputs = prompt("qwen2")
    assert torch.equal(logits(model, inputs), logits(bare, inputs))
    assert torch.equal(generate(model, inputs), generate(bare, inputs))


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_a_processor_that_calls_the_model_while_nothing_is_asked(family):
    """Whatever it calls the model with, none of it was to be steered."""
    model, bare = pair(family, source=None)

    def calls(which):
        def processor(input_ids, scores):
            which(torch.tensor([[5, 6, 7]]))
            return scores + which(input_ids[:, -2:]).logits[:, -1]

        return [processor]

    inputs = make_prompt(family, [[6]])
    assert torch.equal(
        generate(model, inputs, logits_processor=calls(model)), generate(bare, inputs, logits_processor=calls(bare))
    )
