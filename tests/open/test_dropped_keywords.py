"""Somebody between the root and a steered layer drops arguments that he does not know: said, or steered all the same."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import torch
from kit.asking import (
    TOLERANCE,
    generate,
    logits,
    look,
    plain_generate,
    plain_logits,
    prompt,
    right_or_refused,
    saying,
    steer,
    steered,
)
from torch import nn

import hf_steer
from hf_steer import AttentionConfig, PatchError, SaliencyConfig, SteerConfig, disable_steering, patch_model, unpatch_model

OURS = "hf_steer"
TELLING = r"layer|disable_steering"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]
families = pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])


def places(model):
    """Where a keyword can get lost: name -> modules."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    return {"root": [model], "base": [model.base_model], "decoder": [decoder], "every layer": list(decoder.layers),
            "one layer": [decoder.layers[1]], "attention": [layer.self_attn for layer in decoder.layers]}  # fmt: skip


def decoder_of(model):
    return model.get_decoder()


def strip(module, args, kwargs):
    return args, {name: value for name, value in kwargs.items() if name != OURS}


def drop_by_hook(modules):
    for module in modules:
        module.register_forward_pre_hook(strip, with_kwargs=True)


def drop_by_forward(modules):
    """As a quantisation or profiling library replaces a `forward` with its own."""
    for module in modules:
        inner = module.forward

        @functools.wraps(inner)  # generate looks at the signature
        def forward(*args, _inner=inner, **kwargs):
            return _inner(*args, **{name: value for name, value in kwargs.items() if name != OURS})

        module.forward = forward


@families
@pytest.mark.parametrize("drop", [drop_by_hook, drop_by_forward])
@pytest.mark.parametrize("place", ["root", "base", "decoder", "every layer", "one layer", "attention"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lost_keyword_is_said_or_does_not_matter(family, drop, place, when):
    """`when`: before or after patching."""
    inputs = prompt(family)
    good = steered(family)
    said = saying(family, inputs)
    expected, plain = logits(good, inputs, said), plain_logits(good, inputs)
    tokens = generate(good, inputs, said)
    model = unpatch_model(steered(family))
    config = hf_steer.get_steer_status(good).config
    if when == "after":
        patch_model(model, config)
    drop(places(model)[place])
    if when == "before":
        patch_model(model, config)
    right_or_refused(lambda: logits(model, inputs, said), expected, TELLING, unlike=plain)
    right_or_refused(lambda: generate(model, inputs, said), tokens, TELLING, unlike=plain_generate(good, inputs))
    with disable_steering(model):
        assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("place", ["every layer", "one layer"])
def test_a_step_that_loses_it_is_said_though_the_prompt_was_steered(place):
    """As on transformers 5.24, where the prefill was steered and no later step was."""
    good, inputs = steered("qwen2"), prompt("qwen2")
    said = saying("qwen2", inputs)
    expected = generate(good, inputs, said)
    model = steered("qwen2")

    def strip_in_steps(module, args, kwargs):
        return strip(module, args, kwargs) if args[0].shape[1] == 1 else None

    for module in places(model)[place]:
        module.register_forward_pre_hook(strip_in_steps, with_kwargs=True)
    right_or_refused(lambda: generate(model, inputs, said), expected, TELLING)
    right_or_refused(lambda: generate(model, inputs, said, num_beams=2), generate(good, inputs, said, num_beams=2), TELLING)


@torch.no_grad()
def test_a_layer_that_was_never_asked_for_may_lose_it():
    inputs = prompt("qwen2")
    said = saying("qwen2", inputs)
    expected = logits(steered("qwen2", heads={1: "all"}), inputs, said)
    model = steered("qwen2", heads={1: "all"})
    drop_by_hook([decoder_of(model).layers[0], decoder_of(model).layers[2]])
    assert torch.equal(logits(model, inputs, said), expected)


@families
def test_a_compiled_model_is_whole_and_steered(family):
    torch.compiler.reset()
    model, inputs = steered(family), prompt(family)
    said = saying(family, inputs)
    expected = logits(model, inputs, said)
    if family == "qwen2_vl":  # its tower reads grids by value
        compiled = model
        model.get_decoder().compile(fullgraph=False, backend="aot_eager")
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert not torch.allclose(expected, plain_logits(model, inputs), atol=1e-2)
    torch.testing.assert_close(logits(compiled, inputs, said), expected, **TOLERANCE)


@pytest.mark.parametrize("reentrant", [False, True])
@families
def test_gradient_checkpoints_sign_what_they_steer(family, reentrant):
    inputs = prompt(family)
    said = saying(family, inputs)
    gradients = []
    for checkpointing in (False, True):
        model = steered(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with hf_steer.use_saliency(model, said) if said is not None else torch.enable_grad():
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append(decoder_of(model).layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


class Skipping(nn.Module):
    """A decoder layer that is left out at random in training, as LayerDrop does."""

    def __init__(self, layer, skip):
        super().__init__()
        self.layer, self.skip = layer, skip

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states if self.training and self.skip else self.layer(hidden_states, *args, **kwargs)


def test_a_layer_dropped_in_training_needs_no_signature():
    """LayerDrop: the decoder does not call the layer at all."""
    inputs = prompt("qwen2")
    said = saying("qwen2", inputs)
    model = steered("qwen2").train()
    decoder_of(model).config.layerdrop = 0.5
    decoder_of(model).layers[1] = Skipping(decoder_of(model).layers[1], skip=True)
    with hf_steer.use_saliency(model, said):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
    assert loss.isfinite()
    model.eval()
    torch.testing.assert_close(logits(model, inputs, said), logits(steered("qwen2"), inputs, said))


@pytest.mark.parametrize("kept", [slice(0, 2), slice(1, 3)])
def test_a_pipeline_stage_runs_the_layers_that_it_has(kept):
    """A stage has some of the layers; what it gets are hidden states, and it steers what it runs."""
    inputs = prompt("qwen2")
    said = saying("qwen2", inputs)
    stage = copy.deepcopy(steered("qwen2"))
    decoder = decoder_of(stage)
    decoder.layers = nn.ModuleList(decoder.layers[kept])
    decoder.config.num_hidden_layers = len(decoder.layers)
    found = logits(stage, inputs, said, use_cache=False)
    assert not torch.allclose(found, plain_logits(stage, inputs, use_cache=False), atol=1e-2)


@pytest.mark.parametrize("order", ["patch first", "wrap first"])
def test_lora_around_a_steered_model_signs(order):
    inputs = prompt("qwen2")
    said = saying("qwen2", inputs)
    good = steered("qwen2")
    expected, tokens = logits(good, inputs, said), generate(good, inputs, said)
    model = steered("qwen2")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    if order == "patch first":
        wrapped = peft.get_peft_model(model, lora)
    else:
        config = hf_steer.get_steer_status(model).config
        wrapped = peft.get_peft_model(unpatch_model(model), lora)
        patch_model(wrapped.get_base_model(), config)
    wrapped.eval()
    assert torch.equal(logits(wrapped, inputs, said), expected)
    assert torch.equal(generate(wrapped, inputs, said), tokens)


def test_nothing_asked_nothing_signed():
    inputs = prompt("qwen2")
    model = steered("qwen2")
    drop_by_hook(places(model)["every layer"])
    unpatched = unpatch_model(steered("qwen2"))
    assert torch.equal(logits(model, inputs), logits(unpatched, inputs))
    zero = patch_model(
        unpatch_model(model), SteerConfig(attention=AttentionConfig(strength=0.0, saliency=SaliencyConfig(source=None)))
    )
    assert torch.equal(logits(zero, inputs, saying("qwen2", inputs)), logits(unpatched, inputs))


def test_a_layer_whose_attention_was_not_run_is_named():
    """Another library has replaced its forward, or leaves it out."""
    model, inputs = steered("qwen2"), prompt("qwen2")
    skipped = model.model.layers[1].self_attn
    skipped.forward = lambda hidden_states, **_: (hidden_states * 0.5, None)
    with torch.no_grad():
        for call in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2)):
            with pytest.raises(PatchError, match=r"layers \[1\] were to be steered in this pass and were not"):
                call(**inputs, saliency=look(inputs))
        model(**inputs)  # nothing was asked
        with disable_steering(model):
            model(**inputs)
        patch_model(unpatch_model(model), steer("qwen2", heads={0: "all", 2: "all"}))
        model(**inputs, saliency=look(inputs))
