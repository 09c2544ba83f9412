"""The proof runs a likeness of the decoder: once per class, without weights, and without a trace."""

from __future__ import annotations

import pytest
import torch
from kit.allocations import Allocations
from kit.asking import steer
from kit.broken import reclass, state_of
from kit.tiny import make_model, make_prompt
from kit.versions import CACHE
from transformers.models.qwen2 import modeling_qwen2

from hf_steer import patch_model, unpatch_model
from hf_steer.ground import proof
from hf_steer.ground.survey import survey
from hf_steer.patching.plan import make_plan

ATTENTION = "layers.0.self_attn"
KEYWORD = "hf_steer"


@pytest.fixture
def proofs(monkeypatch):
    """The decoders for which the proof was run."""
    ran = []

    def prove(decoder, attention, keyword):
        ran.append(decoder)
        return proof.prove_keyword(decoder, attention, keyword)

    monkeypatch.setattr("hf_steer.ground.survey.prove_keyword", prove)
    return ran


def fresh(**text):
    """A model whose decoder's class has never been proven."""
    model = make_model("qwen2", **text)
    reclass(model.model)
    return model


def test_the_proof_runs_once_per_class_of_decoder(proofs):
    model, other = fresh(), make_model("qwen2")
    other.model.__class__ = type(model.model)
    for _ in range(3):
        unpatch_model(patch_model(model, steer()))
    patch_model(other, steer())
    assert proofs == [model.model]
    another = fresh()
    patch_model(another, steer())
    assert proofs == [model.model, another.model]


def test_a_plan_without_a_gaze_needs_no_proof(proofs):
    survey(make_plan(fresh(), steer(strength=0.0)))
    assert proofs == []


def test_the_survey_allocates_nothing_of_the_models_size(proofs):
    model = fresh(vocab_size=40_000, intermediate_size=4096)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert size > 10_000_000
    plan = make_plan(model, steer())
    with Allocations() as allocated:
        survey(plan)
    assert proofs == [model.model]
    assert allocated.bytes < 4096
    with Allocations() as control:
        torch.empty_like(model.lm_head.weight)
    assert control.bytes > 4_000_000


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl", "deepseek_v3"])
def test_the_likeness_has_one_layer_and_no_weights(family):
    decoder = make_model(family).get_decoder()
    likeness = proof.likeness_of(decoder)
    assert type(likeness) is type(decoder)
    assert len(likeness.layers) == 1
    assert all(parameter.is_meta for parameter in likeness.parameters())
    assert likeness.config is not decoder.config


def test_the_proof_changes_neither_the_model_nor_the_random_numbers_nor_the_defaults():
    model = fresh()
    before, drawn = state_of(model), torch.get_rng_state()
    settings = model.config.to_dict(), torch.get_default_dtype(), torch.is_grad_enabled()
    assert proof.prove_keyword(model.model, ATTENTION, KEYWORD) is None
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert settings == (model.config.to_dict(), torch.get_default_dtype(), torch.is_grad_enabled())
    assert torch.empty(1).device.type == "cpu"


def test_the_model_itself_is_not_run(monkeypatch):
    model, ran = fresh(), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
    assert proof.prove_keyword(model.model, ATTENTION, KEYWORD) is None
    assert ran == []
    model(**make_prompt("qwen2", [[3]]))
    assert len(ran) > 5


def losing(word, *, steps_only=False):
    """An attention that hands its function on without what comes under a word."""
    inner = modeling_qwen2.Qwen2Attention.forward

    def forward(self, hidden_states, *args, **kwargs):
        if not steps_only or hidden_states.shape[1] == 1:
            kwargs.pop(word)
        return inner(self, hidden_states, *args, **kwargs)

    return forward


@pytest.mark.parametrize(("steps_only", "said"), [(False, "in a prompt"), (True, "in a step")])
def test_it_says_in_which_pass_the_keyword_is_lost(steps_only, said, monkeypatch):
    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", losing(KEYWORD, steps_only=steps_only))
    fault = proof.prove_keyword(fresh().model, ATTENTION, KEYWORD)
    assert fault == f"{said} the keyword 'hf_steer' does not reach the attention function"


def test_it_says_how_many_keys_a_step_sees_that_loses_its_cache(monkeypatch):
    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", losing(CACHE, steps_only=True))
    fault = proof.prove_keyword(fresh().model, ATTENTION, KEYWORD)
    assert fault == "in a step on a cache of 2 keys the attention sees 1, and (3, 0) were told"


def test_a_decoder_that_fails_is_a_fault_that_quotes_it(monkeypatch):
    model = fresh()

    def forward(self, hidden_states, *, rotation, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", forward)
    assert "raises TypeError" in str(proof.prove_keyword(model.model, ATTENTION, KEYWORD))
    assert "'rotation'" in str(proof.prove_keyword(model.model, ATTENTION, KEYWORD))


def test_other_threads_can_make_models_meanwhile():
    """`no_init_weights` would take torch's initialisation from all of them, and for good where two proofs overlap."""
    model, seen = fresh(), []
    kind, usual = type(model.model), torch.nn.init.normal_

    def init(self, config):
        seen.append((torch.nn.init.normal_, type(model).init_weights))
        kind.__init__(self, config)

    before = type(model).init_weights
    reclass(model.model, __init__=init)
    assert proof.prove_keyword(model.model, ATTENTION, KEYWORD) is None
    assert seen == [(usual, before)]
