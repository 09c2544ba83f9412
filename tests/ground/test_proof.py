"""The proof runs a likeness of the decoder: once per class and configuration, without weights, and without a trace."""

from __future__ import annotations

import pytest
import torch
from kit.allocations import Allocations
from kit.asking import steer
from kit.broken import reclass, state_of
from kit.tiny import make_model, make_prompt
from kit.tiny_masked import make_masked
from kit.versions import CACHE, RELEASE
from transformers.models.qwen2 import modeling_qwen2

from hf_steer import PatchError, Saliency, patch_model, unpatch_model
from hf_steer.families import resolve
from hf_steer.ground import proof

ATTENTION = ("layers.0.self_attn", "layers.1.self_attn", "layers.2.self_attn")
KEYWORD = "hf_steer"


@pytest.fixture
def likenesses(monkeypatch):
    """The decoders of which a likeness was made."""
    made, make = [], proof.likeness_of

    def likeness_of(decoder):
        made.append(decoder)
        return make(decoder)

    monkeypatch.setattr(proof, "likeness_of", likeness_of)
    return made


def fresh(**text):
    """A model whose decoder's class has never been proven."""
    model = make_model("qwen2", **text)
    reclass(model.model)
    return model


def test_the_proof_runs_once_per_class_and_configuration_of_a_decoder(likenesses):
    model, other, wider = fresh(), make_model("qwen2"), make_model("qwen2", intermediate_size=56)
    other.model.__class__ = wider.model.__class__ = type(model.model)
    for _ in range(3):
        unpatch_model(patch_model(model, steer()))
    patch_model(other, steer())
    assert likenesses == [model.model]
    another = fresh()
    patch_model(another, steer())
    patch_model(wider, steer())
    assert likenesses == [model.model, another.model, wider.model]


@pytest.mark.skipif(RELEASE < (5, 18), reason="GIT takes no cache there, and is refused")
def test_a_proof_that_ends_well_is_kept_where_it_found_nothing_either(likenesses):
    """What GIT looks functions up for is its eye; its decoder gets the bias with its mask."""
    model = make_masked("git")
    model.git.__class__ = type("GitModel", (type(model.git),), {})
    resolve(model)
    first = len(likenesses)
    assert first
    assert resolve(model).carried == "mask"
    assert len(likenesses) == first


def test_resolving_allocates_nothing_of_the_models_size(likenesses):
    model = fresh(vocab_size=40_000, intermediate_size=4096)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert size > 10_000_000
    with Allocations() as allocated:
        resolve(model)
    assert likenesses == [model.model]
    assert allocated.bytes < 4096
    with Allocations() as control:
        torch.empty_like(model.lm_head.weight)
    assert control.bytes > 4_000_000


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl", "deepseek_v3"])
def test_the_likeness_has_all_layers_and_no_weights(family):
    decoder = make_model(family).get_decoder()
    likeness = proof.likeness_of(decoder)
    assert type(likeness) is type(decoder)
    assert len(likeness.layers) == len(decoder.layers)
    assert all(parameter.is_meta for parameter in likeness.parameters())
    assert likeness.config is not decoder.config


def test_the_proof_changes_neither_the_model_nor_the_random_numbers_nor_the_defaults():
    model = fresh()
    before, drawn = state_of(model), torch.get_rng_state()
    settings = model.config.to_dict(), torch.get_default_dtype(), torch.is_grad_enabled()
    assert proof.prove(model.model, ATTENTION).whole
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert settings == (model.config.to_dict(), torch.get_default_dtype(), torch.is_grad_enabled())
    assert torch.empty(1).device.type == "cpu"


def test_the_model_itself_is_not_run(monkeypatch):
    model, ran = fresh(), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
    assert proof.prove(model.model, ATTENTION).whole
    assert ran == []
    model(**make_prompt("qwen2", [[3]]))
    assert len(ran) > 5


def losing(word, *, steps_only=False):
    """An attention that hands its function on without what comes under a word."""
    inner = modeling_qwen2.Qwen2Attention.forward

    def forward(self, hidden_states, *args, **kwargs):
        if not steps_only or hidden_states.shape[1] == 1:
            kwargs.pop(word, None)
        return inner(self, hidden_states, *args, **kwargs)

    return forward


@pytest.mark.parametrize("steps_only", [False, True])
def test_a_keyword_that_is_lost_in_a_prompt_or_a_step_is_seen(steps_only, monkeypatch):
    assert all(own.keyword for own in proof.prove(fresh().model, ATTENTION).seen.values())
    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", losing(KEYWORD, steps_only=steps_only))
    model = fresh()
    assert not any(own.keyword for own in proof.prove(model.model, ATTENTION).seen.values())
    assert resolve(model).carried == "pass"


def test_steering_arrives_all_the_same_where_the_keyword_is_lost(monkeypatch):
    kept, ids = make_model("qwen2"), torch.arange(5, 14)[None]
    said = Saliency.from_tokens(torch.linspace(-1, 1, 9)[None])
    expected = patch_model(kept, steer(strength=2.0))(ids, saliency=said).logits
    plain = unpatch_model(kept)(ids).logits
    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", losing(KEYWORD))
    model = fresh()
    model.load_state_dict(kept.state_dict())
    patch_model(model, steer(strength=2.0))
    found = model(ids, saliency=said).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert torch.equal(model(ids).logits, plain)
    model.model.gradient_checkpointing = True
    model.train()
    with pytest.raises(PatchError, match="hands no keyword arguments on to its attention.*gradient_checkpointing_disable"):
        model(ids, saliency=said)
    assert model(ids).logits.shape == plain.shape


def test_keys_that_a_step_loses_leave_a_layer_out_and_say_so(monkeypatch):
    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", losing(CACHE, steps_only=True))
    anatomy = resolve(fresh())
    assert anatomy.layers == ()
    assert "a step after 2 tokens gives it 1 keys" in anatomy.left_out["model.layers.0.self_attn"]


def test_a_decoder_that_fails_is_a_fault_that_quotes_it(monkeypatch):
    model = fresh()

    def forward(self, hidden_states, *, rotation, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", forward)
    found = proof.prove(model.model, ATTENTION)
    assert "a prompt of a likeness raises TypeError" in found.fault
    assert "'rotation'" in found.fault


def test_other_threads_can_make_models_meanwhile():
    """`no_init_weights` would take torch's initialisation from all of them, and for good where two proofs overlap."""
    model, seen = fresh(), []
    kind, usual = type(model.model), torch.nn.init.normal_

    def init(self, config):
        seen.append((torch.nn.init.normal_, type(model).init_weights))
        kind.__init__(self, config)

    before = type(model).init_weights
    reclass(model.model, __init__=init)
    assert proof.prove(model.model, ATTENTION).whole
    assert seen == [(usual, before)]
