"""λ per head as parameters: bit-equal at first, the gradients of the formula through any backend, trained, saved, loaded."""

from __future__ import annotations

import pytest
import torch
from kit.gazing import every, gaze, generate, logits, looking, prompt_for, steer
from kit.tiny import HEADS, LAYERS, make_model

import hf_steer
from hf_steer import AttentionConfig, ConfigError, FileError, SaliencyConfig, SteerConfig, patch_model, unpatch_model, use_strength

HEADS_LEARNED = {1: (0, 3), LAYERS - 1: "all"}
COUNT = 2 + HEADS


def learned(family, **attention):
    return steer(family, strength="trainable", heads=HEADS_LEARNED, **attention)


def values_of(model):
    return dict(model.hf_steer.learned.layers.items())


def set_values(model, seed=0):
    """Random λ, and the same as a configuration has them."""
    generator = torch.Generator().manual_seed(seed)
    wanted = {}
    with torch.no_grad():
        for layer, parameter in values_of(model).items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2)
            heads = (0, 3) if layer == "1" else range(HEADS)
            wanted[int(layer)] = dict(zip(heads, parameter.tolist(), strict=True))
    return wanted


@every
def test_fresh_strengths_are_bit_equal_and_learned_ones_equal_configured_ones(family, implementation):
    model, inputs = make_model(family, implementation), prompt_for(family)
    plain = logits(model, inputs)
    patch_model(model, learned(family))
    assert torch.equal(logits(model, inputs, gaze(family, inputs)), plain)
    wanted = set_values(model)
    steered, said = logits(model, inputs, gaze(family, inputs)), generate(model, inputs, gaze(family, inputs))
    patch_model(unpatch_model(model), steer(family, heads=HEADS_LEARNED, strength=wanted))
    assert torch.equal(logits(model, inputs, gaze(family, inputs)), steered)
    assert torch.equal(generate(model, inputs, gaze(family, inputs))[1], said[1])
    assert not torch.equal(steered, plain)
    unpatch_model(model)
    assert torch.equal(logits(model, inputs), plain)


@every
@pytest.mark.parametrize("preserve_mass", [False, True])
def test_gradients_are_those_of_finite_differences_through_every_backend(family, implementation, preserve_mass):
    inputs = prompt_for(family, rows=[[4, ("image", 2, 3), 5]])  # eager attention of padded rows is NaN in float64
    labels = inputs["input_ids"]
    found = {}
    for backend, checkpointing in (("mask", False), ("folded", False), ("auto", True)):
        model = make_model(family, implementation).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        patch_model(model, learned(family, backend=backend, preserve_mass=preserve_mass))
        set_values(model)
        with looking(model, gaze(family, inputs)):
            model(**inputs, labels=labels).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is not None] == [
            f"hf_steer.learned.layers.{layer}" for layer in ("1", str(LAYERS - 1))
        ]
        found[backend] = {layer: parameter.grad for layer, parameter in values_of(model).items()}
    for other in ("folded", "auto"):
        for layer, gradient in found["mask"].items():
            torch.testing.assert_close(found[other][layer], gradient, rtol=1e-3, atol=1e-6)
    model.double()  # eager's softmax stays float32 in transformers, so the step is not small, and neither is its error
    parameter, place = values_of(model)["1"], 1
    losses = []
    for step in (0.02, -0.02):
        with torch.no_grad(), looking(model, gaze(family, inputs)):
            parameter[place] += step
            scores = model(**doubled(inputs), labels=labels).logits[0, :-1]
            losses.append(float(torch.nn.functional.cross_entropy(scores, labels[0, 1:])))
            parameter[place] -= step
    slope = (losses[0] - losses[1]) / 0.04
    torch.testing.assert_close(found["mask"]["1"][place].item(), slope, rtol=2e-3, atol=2e-5)


def doubled(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@every
def test_ordinary_training_moves_the_strengths_and_nothing_else(family, implementation, tmp_path):
    model, inputs = make_model(family, implementation), prompt_for(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patch_model(model, learned(family))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) < 2, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == COUNT
    losses = []
    for _ in range(12):
        with looking(model, gaze(family, inputs)):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert set(after) - set(before) == {"hf_steer.learned.layers.1", f"hf_steer.learned.layers.{LAYERS - 1}"}
    steered = logits(model, inputs, gaze(family, inputs))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "hf_steer" / "steer_model.safetensors").is_file()
    loaded = hf_steer.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert torch.equal(logits(loaded, inputs, gaze(family, inputs)), steered)
    with use_strength(loaded, 0):
        assert not torch.equal(logits(loaded, inputs, gaze(family, inputs)), steered)


def test_a_change_after_the_first_look_is_seen():
    """Whether all strengths are 0 is remembered between calls, until one of them changes."""
    model = patch_model(make_model("qwen2_vl"), learned("qwen2_vl"))
    inputs = prompt_for("qwen2_vl")
    plain = logits(model, inputs)
    set_values(model)
    assert not torch.equal(logits(model, inputs), plain)
    with torch.no_grad():
        for parameter in values_of(model).values():
            parameter.zero_()
    assert torch.equal(logits(model, inputs), plain)


def test_half_precision_keeps_learned_strengths_exact_enough_to_learn():
    """bfloat16 would lose steps of 0.001 at λ = 2; the parameters stay float32."""
    model = make_model("qwen2_vl").to(torch.bfloat16)
    patch_model(model, learned("qwen2_vl"))
    assert {parameter.dtype for parameter in values_of(model).values()} == {torch.float32}
    set_values(model)
    inputs = prompt_for("qwen2_vl")
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    steered = logits(model, inputs)
    assert torch.isfinite(steered).all()


def test_weights_of_other_heads_and_missing_weights_are_refused(tmp_path):
    model = patch_model(make_model("llama"), learned("llama"))
    set_values(model)
    hf_steer.save_steering(model, tmp_path)
    other = patch_model(make_model("llama"), steer("llama", strength="trainable", heads={1: (0, 1, 2), -1: "all"}))
    before = {layer: parameter.clone() for layer, parameter in values_of(other).items()}
    with pytest.raises(FileError, match="shape"):
        hf_steer.load_steering(other, tmp_path)
    assert all(torch.equal(before[layer], parameter) for layer, parameter in values_of(other).items())
    (tmp_path / "hf_steer" / "steer_model.safetensors").unlink()
    fresh = patch_model(make_model("llama"), learned("llama"))
    with pytest.raises(FileError):
        hf_steer.load_steering(fresh, tmp_path)


def test_only_the_word_trainable_is_learned():
    with pytest.raises(ConfigError, match="attention.strength must be a finite number"):
        AttentionConfig(strength="learned")
    config = SteerConfig(attention=AttentionConfig(strength="trainable", saliency=SaliencyConfig(source=None)))
    assert SteerConfig.from_dict(config.to_dict()) == config
    assert config.has_weights
