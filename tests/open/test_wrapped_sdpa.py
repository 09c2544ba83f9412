"""Somebody wrapped "sdpa" before the model was patched: still causal, still his function, still the same bias."""

from __future__ import annotations

import functools

import pytest
import torch
from kit.asking import TOLERANCE, cache_for, generate, logits, look, plain_logits, prompt, steered, with_cache
from kit.tiny import make_prompt
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_steer import Saliency, use_saliency

pytestmark = pytest.mark.filterwarnings("ignore:backend 'cpu_flash' gives way")
BACKENDS = ("auto", "folded", "mask", "cpu_flash")


@pytest.fixture(params=["function", "partial", "object", "method"])
def calls(request, monkeypatch):
    """Numbers of queries that the wrapper was called with."""
    plain, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def wrapper(module, query, key, value, attention_mask, **kwargs):
        seen.append(query.shape[2])
        return plain(module, query, key, value, attention_mask, **kwargs)

    class Wrapper:
        def __call__(self, *args, **kwargs):
            return wrapper(*args, **kwargs)

        def attend(self, *args, **kwargs):
            return wrapper(*args, **kwargs)

    made = {"function": wrapper, "partial": functools.partial(wrapper), "object": Wrapper(), "method": Wrapper().attend}
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", made[request.param])
    return seen


def expected_logits(inputs, said):
    """By an eager model: it never asks which function sdpa is."""
    return logits(steered("qwen2", implementation="eager", normalize="none"), inputs, said)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_future_stays_hidden(calls, backend, rows):
    """Without padding transformers gives sdpa no mask, and no mask means causal."""
    model, inputs = steered("qwen2", backend=backend, normalize="none"), prompt("qwen2", rows=rows)
    said = look(inputs)
    bare = {"input_ids": inputs["input_ids"]}
    before = logits(model, bare, said)
    changed = {"input_ids": bare["input_ids"].clone()}
    changed["input_ids"][:, -1] += 1
    after = logits(model, changed, said)
    torch.testing.assert_close(after[:, :-1], before[:, :-1], **TOLERANCE)
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-2)
    assert not torch.allclose(before, plain_logits(model, bare), atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_the_written_out_attention(calls, backend):
    inputs = prompt("qwen2")
    said = look(inputs)
    model = steered("qwen2", backend=backend, normalize="none")
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        torch.testing.assert_close(logits(model, given, said), expected_logits(inputs, said), **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_and_the_folded_backend_agree_step_by_step(calls, backend):
    inputs = prompt("qwen2", rows=2)
    said = look(inputs)
    found = []
    for name in (backend, "folded"):
        model = steered("qwen2", backend=name, normalize="none")
        cache, steps = cache_for(model), []
        with use_saliency(model, said):
            steps.append(logits(model, {"input_ids": inputs["input_ids"]}, **with_cache(model, cache)))
        for token in (5, 6):
            steps.append(logits(model, {"input_ids": torch.tensor([[token]] * 2)}, **with_cache(model, cache)))
        found.append(torch.cat(steps, 1))
    torch.testing.assert_close(*found, **TOLERANCE)


@pytest.mark.parametrize("backend", ["auto", "folded", "mask"])
def test_the_wrapper_really_runs_for_prompts_and_steps(calls, backend):
    model, inputs = steered("qwen2", backend=backend), prompt("qwen2")
    calls.clear()
    generate(model, inputs, look(inputs), max_new_tokens=3)
    layers = len(model.get_decoder().layers)
    assert calls.count(9) == layers
    assert calls.count(1) == 2 * layers


def test_wrapped_padding_is_still_padding(calls):
    inputs = make_prompt("qwen2", [[9], [6]])
    said = Saliency.from_tokens(torch.randn(2, 9))
    found = {name: logits(steered("qwen2", backend=name), inputs, said) for name in ("folded", "mask")}
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found["mask"][real], found["folded"][real], **TOLERANCE)
