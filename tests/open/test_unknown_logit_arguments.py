"""An attention function with an argument that changes its logits, under a name that nobody knows: exact, or refused by name."""

from __future__ import annotations

import pytest
import torch
from kit.asking import TOLERANCE, answer_or_refusal, generate, logits, look, plain_logits, prompt, steered
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_steer import SteerError

CAP = 1.5


@pytest.fixture
def capped(monkeypatch):
    """sdpa with a softcap of its own, which layers give as `logit_cap`."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, logit_cap=None, **kwargs):
        if logit_cap is None:
            return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
        groups = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
        scores = logit_cap * torch.tanh(query @ key.transpose(2, 3) * scaling / logit_cap)
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        if attention_mask is not None:
            allowed = attention_mask
        scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)


def cap(model, value, *, first=0):
    """Layers, from the first of them on, that hand the argument to their attention."""
    for layer in model.get_decoder().layers[first:]:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "logit_cap": value}), with_kwargs=True
        )
    return model


@pytest.mark.parametrize("backend", ["auto", "folded", "mask"])
def test_one_that_is_given_is_refused_by_its_name_or_heeded(capped, backend):
    inputs = prompt("qwen2")
    said = look(inputs)
    model = cap(steered("qwen2", backend=backend, normalize="none"), CAP)
    plain = plain_logits(model, inputs)
    for call in (logits, generate):
        found, refusal = answer_or_refusal(lambda call=call: call(model, inputs, said))
        if refusal is not None:
            assert "logit_cap" in refusal
            continue
        if call is logits:  # after the cap, as a mask is added
            mask = torch.where(torch.ones(9, 9, dtype=torch.bool).tril(), 3.0 * said.tokens[:, None, None], -1e30)
            expected = plain_logits(model, {**inputs, "attention_mask": mask})
            torch.testing.assert_close(found, expected, **TOLERANCE)
            assert not torch.allclose(expected, plain, atol=1e-2)


def test_one_that_a_later_layer_alone_gives_is_refused(capped):
    inputs = prompt("qwen2")
    model = cap(steered("qwen2"), CAP, first=1)
    with pytest.raises(SteerError, match="layer 1 calls its attention with logit_cap"):
        logits(model, inputs, look(inputs))


@pytest.mark.parametrize("backend", ["auto", "folded", "mask"])
def test_one_that_is_none_is_let_pass(capped, backend):
    inputs = prompt("qwen2")
    said = look(inputs)
    model = cap(steered("qwen2", backend=backend), None)
    torch.testing.assert_close(logits(model, inputs, said), logits(steered("qwen2", backend=backend), inputs, said), **TOLERANCE)


def test_an_unsteered_call_is_let_pass(capped):
    inputs = prompt("qwen2")
    bare, model = cap(steered("qwen2"), CAP), cap(steered("qwen2"), CAP)
    assert torch.equal(logits(model, inputs), plain_logits(bare, inputs))
    assert not torch.allclose(logits(model, inputs), logits(steered("qwen2"), inputs), atol=1e-2)  # the cap is on


def test_one_that_is_read_out_of_further_arguments_is_refused(monkeypatch):
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module, query, key, value, attention_mask, **kwargs):
        cap = kwargs.pop("logit_cap", None)
        return plain(module, query if cap is None else query / cap, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)
    inputs = prompt("qwen2")
    with pytest.raises(SteerError, match="calls its attention with logit_cap"):
        logits(cap(steered("qwen2"), CAP), inputs, look(inputs))
    assert torch.isfinite(logits(cap(steered("qwen2"), None), inputs, look(inputs))).all()
