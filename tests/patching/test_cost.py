"""Only what is steered pays: layers without steered heads, set-up per pass, memory, and patching itself."""

from __future__ import annotations

import copy

import pytest
import torch
from kit.allocations import Allocations
from kit.calls import call_of
from kit.gazing import gaze, prompt_for, steer
from kit.tiny import make_model
from kit.versions import cached
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_steer import AttentionConfig, SaliencyConfig, SteerConfig, patch_model, use_saliency
from hf_steer.attention import backends, cpu_flash, folded, masked
from hf_steer.values import HeadBias

LAYERS = 6


def deep_model():
    """More layers than `tiny`'s, so that once per pass and once per layer differ."""
    return make_model("qwen2", num_hidden_layers=LAYERS)


def counting(monkeypatch, module, name):
    calls = []
    original = getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_layers_without_steered_heads_run_the_original_function_on_the_original_config():
    model = deep_model()
    config, sdpa = model.config, ALL_ATTENTION_FUNCTIONS["sdpa"]
    patch_model(model, steer("qwen2", heads={2: (0, 3)}))
    for layer in model.model.layers:
        attention, used = layer.self_attn, ALL_ATTENTION_FUNCTIONS[layer.self_attn.config._attn_implementation]
        assert type(layer).forward is type(model.model.layers[0]).forward
        for module in (layer, attention):
            assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 0
        if attention.layer_idx == 2:
            assert used.keywords["choose"] is backends.attend_for
            assert used.keywords["inner"] is sdpa
        else:
            assert attention.config is config
            assert used is sdpa
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa


@torch.no_grad()
@pytest.mark.parametrize("heads", ["all", {1: (0, 3), -1: "all"}], ids=str)
def test_unsteered_layers_do_the_operations_that_they_did_and_no_more(heads):
    """Operations of a pass, counted: each steered layer adds the same number, the others none."""

    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    inputs = prompt_for("qwen2", rows=[[9], [6]])
    added = []
    for depth in (LAYERS, LAYERS + 2):
        model = make_model("qwen2", num_hidden_layers=depth)
        counts = []
        for patched in (False, True):
            if patched:
                patch_model(model, steer("qwen2", heads=heads))
            with Operations() as counted:
                if patched:
                    with use_saliency(model, gaze("qwen2", inputs)):
                        model(**inputs, use_cache=False)
                else:
                    model(**inputs, use_cache=False)
            counts.append(counted.count)
        added.append(counts[1] - counts[0])
    assert added[0] > 0
    assert (added[1] == added[0]) == (heads != "all")


@torch.no_grad()
@pytest.mark.parametrize("strength", [2.0, {layer: 1.0 + layer for layer in range(LAYERS)}], ids=["same", "own"])
def test_the_bias_is_set_up_once_for_all_layers_that_share_it(strength, monkeypatch):
    model = patch_model(deep_model(), steer("qwen2", heads="all", strength=strength))
    dense, query, key = (
        counting(monkeypatch, *place) for place in ((masked, "dense_bias"), (folded, "split_query"), (folded, "split_key"))
    )
    inputs, cache = prompt_for("qwen2", rows=[[9], [6]]), DynamicCache(config=model.config)
    each = 1 if strength == 2.0 else LAYERS
    with use_saliency(model, gaze("qwen2", inputs)):
        model(**inputs, **cached(cache))
        assert (len(dense), len(query), len(key)) == (0, each, 1)  # the keys' part is the same for every strength
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        model(input_ids=inputs["input_ids"][:, :1], attention_mask=mask, **cached(cache))
    assert (len(dense), len(query), len(key)) == (each, each, 1)


@torch.no_grad()
def test_an_unpadded_prompt_on_a_cpu_is_set_up_once_and_copies_no_queries_or_keys(monkeypatch):
    model = patch_model(deep_model(), steer("qwen2", heads="all"))
    dense = counting(monkeypatch, cpu_flash, "dense_bias")
    folds = counting(monkeypatch, folded, "split_query")
    inputs = prompt_for("qwen2", rows=[[9]])
    with use_saliency(model, gaze("qwen2", inputs)):
        model(input_ids=inputs["input_ids"])
    assert (len(dense), len(folds)) == (1, 0)


def test_what_is_kept_for_other_layers_is_not_kept_where_gradients_flow():
    """Gradient checkpointing runs a layer again and compares what it saves."""
    for learned in (False, True):
        bias = HeadBias(torch.ones(1, 2, 1, 1, requires_grad=learned), torch.ones(1, 5, 1))
        query, key = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8)
        call = call_of(None, query, key, key, None, bias, inner=lambda *args, **kwargs: (args[1].transpose(1, 2), None))
        folded.attend_folded(call, bias)
        assert bool(bias.forms) != learned
        assert bias.key_forms


@pytest.mark.parametrize("strength", [2.0, "trainable"])
def test_patching_a_model_of_seven_billion_parameters_allocates_nothing_of_its_size(strength):
    text = {
        "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
        "num_hidden_layers": 28, "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config={"hidden_size": 3584}))
    assert sum(parameter.numel() for parameter in model.parameters()) > 7e9
    before = copy.copy(model.state_dict())
    attention = AttentionConfig(strength=strength, saliency=SaliencyConfig(source="vision_attention"))
    with Allocations() as allocated:
        patch_model(model, SteerConfig(attention=attention))
    assert allocated.bytes < 64 * 1024  # 28 layers × 28 learned strengths are 3 KB
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in before}
    assert all(own[name].numel() == 28 for name in own)
    assert len(own) == (28 if strength == "trainable" else 0)
