"""On a GPU: every backend against float64 in values and gradients, graphs that are captured, and steps that never wait."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kit.calls import attend_with, call_of
from kit.gazing import gaze, prompt_for, steer
from kit.tiny import make_model
from kit.versions import cached
from torch._dynamo.utils import counters
from transformers import StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_steer import disable_steering, patch_model, use_saliency
from hf_steer.attention import head_bias
from hf_steer.attention.backends import refuse
from hf_steer.values import TokenScores

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
BATCH, HEADS, KEY_HEADS, TOKENS = 2, 4, 2, 150
SCALING = 0.1


def exact(query, key, value, strength, scores, allowed):
    key, value = (own.repeat_interleave(HEADS // KEY_HEADS, 1) for own in (key, value))
    logits = query @ key.mT * SCALING + strength[:, None, None] * scores[:, None, None]
    return (logits.masked_fill(~allowed, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def gradients(attend, tensors, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [own.detach().clone().to(dtype if number < 3 else wide).requires_grad_() for number, own in enumerate(tensors)]
    output = attend(*leaves)
    mixture = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device="cuda").reshape(output.shape)
    (output.double() * mixture).sum().backward()
    return [output.detach().double(), *(None if leaf.grad is None else leaf.grad.double() for leaf in leaves)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("backend", ["folded", "mask", "flex", "triton"])
def test_values_and_gradients_are_as_exact_as_those_of_the_plain_kernel(backend, head_dim, dtype, padded):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    tensors = [draw(BATCH, HEADS, TOKENS, head_dim), *(draw(BATCH, KEY_HEADS, TOKENS, head_dim) for _ in range(2))]
    tensors = [own.to(dtype) for own in tensors] + [torch.tensor([1.5, 0.0, -2.0, 0.4], device="cuda"), draw(BATCH, TOKENS)]
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device="cuda").tril().expand(BATCH, 1, -1, -1).clone()
    if padded:
        allowed[1, :, :, :9] = False
        allowed[1, :, :9, 0] = True  # padding looks somewhere, so that no row is empty
    mask = allowed if padded else None
    site = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True, layer_idx=0, training=False)

    def plain(query, key, value, strength, scores):
        return sdpa_attention_forward(site, query, key, value, mask, scaling=SCALING)[0]

    def steered(query, key, value, strength, scores):
        bias = head_bias(TokenScores(scores, torch.zeros_like(scores).long()), strength, None, None)
        assert refuse(backend, call_of(site, query, key, value, mask, bias, implementation="sdpa", kwargs={})) is None
        return attend_with(backend, sdpa_attention_forward, site, query, key, value, mask, bias, scaling=SCALING)[0]

    def formula(query, key, value, strength, scores):
        return exact(query, key, value, strength, scores, allowed)

    def unsteered(query, key, value, strength, scores):
        return exact(query, key, value, strength * 0, scores, allowed)

    def relative(found, wanted):
        return [float((own - true).norm() / true.norm()) for own, true in zip(found, wanted, strict=True) if own is not None]

    floor = max(relative(gradients(plain, tensors, dtype)[:4], gradients(unsteered, tensors, torch.float64)[:4]))
    errors = relative(gradients(steered, tensors, dtype), gradients(formula, tensors, torch.float64))
    assert len(errors) == 6
    # a 16-bit mask rounds the bias, which the others do not
    assert max(errors) < (6 if backend == "mask" else 3) * floor, (errors, floor)


@torch.no_grad()
@pytest.mark.parametrize("attention", [{}, {"preserve_mass": True}, {"queries": "generated"}], ids=str)
def test_a_step_is_captured_in_a_cuda_graph_and_equals_the_uncaptured_one(attention):
    model = patch_model(make_model("qwen2").cuda(), steer("qwen2", **attention))
    inputs = {name: own.cuda() for name, own in prompt_for("qwen2", rows=[[9], [9]]).items()}
    found = []
    for run in (model, torch.compile(model, mode="reduce-overhead", fullgraph=True)):
        cache, logits = StaticCache(config=model.config, max_cache_len=32), []
        with use_saliency(model, gaze("qwen2", inputs)):
            out = model(input_ids=inputs["input_ids"], **cached(cache))
            for _ in range(12):
                logits.append(out.logits[:, -1].clone())
                torch.compiler.cudagraph_mark_step_begin()
                out = run(input_ids=out.logits[:, -1:].argmax(-1), **cached(cache))
        found.append(torch.stack(logits))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)  # other kernels, tf32 off
    assert not counters["inductor"]["cudagraph_skips"]  # which inductor says nowhere else
    with disable_steering(model):
        plain = model(input_ids=inputs["input_ids"]).logits[:, -1]
    assert (found[0][0] - plain).abs().max() > 0.1


@torch.no_grad()
def test_no_step_waits_for_the_gpu():
    model = patch_model(make_model("qwen2").cuda(), steer("qwen2", queries="generated"))
    inputs = {name: own.cuda() for name, own in prompt_for("qwen2", rows=[[9], [9]]).items()}
    cache = StaticCache(config=model.config, max_cache_len=32)
    with use_saliency(model, gaze("qwen2", inputs)):
        out = model(input_ids=inputs["input_ids"], **cached(cache))
        token = out.logits[:, -1:].argmax(-1)
        model(input_ids=token, **cached(cache))
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(input_ids=token, **cached(cache))
        finally:
            torch.cuda.set_sync_debug_mode("default")
