"""Models that run flash or flex attention: steered like the same models under sdpa.

Flash attention runs on GPUs alone. Its kernel is replaced by one in plain torch; masks, the search for the kernel and all
else are transformers' own.
"""

from __future__ import annotations

import re

import pytest
import torch
from kit.gazing import TOLERANCE, gaze, generate, logits, prompt_for, real_logits, steer
from kit.tiny import make_model
from torch._dynamo.utils import counters
from torch.nn import functional as F

from hf_steer import AttentionConfig, SaliencyConfig, SteerConfig, patch_model, unpatch_model, use_saliency
from hf_steer.analysis import attention_metrics
from hf_steer.errors import PatchError, SteerError


def attend(query, key, value, allowed, scale):
    """`(rows, tokens, heads, features)` in and out, as flash's."""
    query, key, value = (own.transpose(1, 2) for own in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale, enable_gqa=True)
    return out.nan_to_num().transpose(1, 2)


@pytest.fixture
def flash(monkeypatch):
    """Plain torch in the place of flash's kernel; collects by which names it was asked for, and the sizes of the heads."""
    asked = []

    def kernel(query, key, value, mask, query_length, is_causal, *, softmax_scale, attn_implementation, **kwargs):
        asked.append((attn_implementation, query.shape[-1]))
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        assert query.shape[-1] % 8 == 0
        starts = kwargs.get("cu_seq_lens_q")
        if starts is not None:  # pictures side by side in one row
            parts = [own.split(starts.diff().tolist(), 1) for own in (query, key, value)]
            return torch.cat([attend(*part, None, softmax_scale) for part in zip(*parts, strict=True)], 1)
        queries, keys = query.shape[1], key.shape[1]
        allowed = torch.ones(queries, keys, dtype=torch.bool)
        if is_causal:
            allowed = allowed.tril(keys - queries)
        if mask is not None:
            assert mask.ndim == 2
            allowed = allowed & mask[:, None, None, :keys].bool()
        return attend(query, key, value, allowed, softmax_scale)

    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", kernel)
    return asked


def running(model, implementation):
    """The model, as if it had been loaded with this implementation, all of its parts included."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = implementation
    return model


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("backend", ["auto", "folded"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen2_vl"])
def test_flash_attention_is_steered_like_sdpa(family, backend, version, flash):
    inputs = prompt_for(family)
    found, name = [], f"flash_attention_{version}"
    for implementation in ("sdpa", name):
        model = running(make_model(family), implementation)
        plain = logits(model, inputs)
        patch_model(model, steer(family, backend=backend))
        steered = logits(model, inputs, gaze(family, inputs))
        found.append((real_logits(plain, inputs), real_logits(steered, inputs), generate(model, inputs, gaze(family, inputs))[1]))
        asked = set(flash)
        unpatch_model(model)
        assert torch.equal(logits(model, inputs), plain)
    assert {own for own, _ in asked} == {name}
    head_dim = 8
    assert {size for _, size in asked} == {head_dim, head_dim + 8}  # the layers that are steered have their channels
    for own, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, expected, **TOLERANCE)
    assert (found[0][1] - found[0][0]).abs().max() > 0.1


def test_a_mask_cannot_go_into_flash_so_the_channels_do_and_that_is_said(flash):
    from hf_steer.errors import say_once

    say_once.cache_clear()
    model, inputs = running(make_model("qwen2"), "flash_attention_2"), prompt_for("qwen2")
    patch_model(model, steer("qwen2", backend="mask"))
    with pytest.warns(match="'mask' gives way to 'folded', with the same result: .*masks of 'flash_attention_2'"):
        logits(model, inputs, gaze("qwen2", inputs))


def test_softcapped_flash_attention_is_refused_not_bent(flash):
    model, inputs = running(make_model("gemma2", "eager"), "flash_attention_2"), prompt_for("qwen2")
    patch_model(model, steer("qwen2"))
    with pytest.raises(SteerError, match="no backend can carry .*softcapped logits would bend .*attn_implementation='eager'"):
        logits(model, inputs, gaze("qwen2", inputs))


def test_flash_attention_is_not_read(flash):
    model = running(make_model("qwen2_vl"), "flash_attention_2")
    saliency = SaliencyConfig(source="decoder_attention")
    with pytest.raises(PatchError, match="reads attention weights.*'flash_attention_2'.*eager, sdpa, flex_attention"):
        patch_model(model, SteerConfig(attention=AttentionConfig(saliency=saliency)))
    with pytest.raises(SteerError, match="cannot be read through attention implementation 'flash_attention_2'"):
        attention_metrics(model, prompt_for("qwen2_vl"), span=None)


@pytest.mark.parametrize("implementation", ["paged|sdpa", "sdpa_paged", "flash_attention_4", "my_own"])
def test_an_implementation_that_cannot_carry_the_bias_is_refused_by_name(implementation):
    model = running(make_model("qwen2"), implementation)
    named = f"{implementation!r}; hf_steer can steer eager, sdpa, flex_attention, flash_attention_2"
    with pytest.raises(PatchError, match=f"{re.escape(named)}.*attn_implementation='sdpa'"):
        patch_model(model, steer("qwen2"))


@pytest.mark.usefixtures("flex_without_a_compiler")
@pytest.mark.parametrize("preserve_mass", [False, True])
@pytest.mark.parametrize("backend", ["auto", "folded"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_flex_attention_is_steered_like_sdpa(family, backend, preserve_mass):
    inputs = prompt_for(family)
    found = []
    for implementation in ("sdpa", "flex_attention"):
        model = make_model(family, implementation)
        plain = logits(model, inputs)
        patch_model(model, steer(family, backend=backend, preserve_mass=preserve_mass))
        found.append([real_logits(own, inputs) for own in (plain, logits(model, inputs, gaze(family, inputs)))])
        unpatch_model(model)
        assert torch.equal(logits(model, inputs), plain)
    for own, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, expected, **TOLERANCE)
    assert (found[0][1] - found[0][0]).abs().max() > 0.1


@pytest.mark.usefixtures("flex_without_a_compiler")
def test_attention_is_read_through_flex_as_through_sdpa():
    inputs, found = prompt_for("qwen2"), []
    for implementation in ("sdpa", "flex_attention"):
        model = patch_model(make_model("qwen2", implementation), steer("qwen2"))
        with use_saliency(model, gaze("qwen2", inputs)):
            found.append(attention_metrics(model, inputs, span=None))
    for name in ("entropy_nats", "kl_nats"):
        own, expected = (getattr(metrics, name) for metrics in reversed(found))
        torch.testing.assert_close(own, expected, **TOLERANCE)
        assert expected.abs().max() > 0.1


@torch.no_grad()
@pytest.mark.usefixtures("flex_without_a_compiler")
def test_flex_attention_is_compiled_once_for_all_prompts_of_a_shape():
    """The scores, strengths and gates are captured tensors; constants would compile anew."""
    torch.compiler.reset()
    model = patch_model(make_model("qwen2", "flex_attention"), steer("qwen2", heads={1: "all"}, queries="generated"))
    inputs, graphs, outputs = prompt_for("qwen2"), [], []
    for number in range(3):
        outputs.append(logits(model, inputs, gaze("qwen2", inputs, number)))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0
    assert (outputs[0] - outputs[1]).abs().max() > 0.1
