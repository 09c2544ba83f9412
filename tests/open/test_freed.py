"""Steered caches and unpatched models are freed as soon as plain ones: by reference count, without the collector."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from kit.asking import cache_for, generate, logits, look, prompt, saying, steer, steered, with_cache
from kit.tiny import make_model
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model
from transformers import StaticCache

from hf_steer import AlignerConfig, SteerConfig, patch_model, trace_steering, unpatch_model, use_saliency, use_strength

families = pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])


@pytest.fixture(autouse=True)
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def static_cache(model):
    return StaticCache(config=model.config.get_text_config(), max_cache_len=40)


def is_freed(reference):
    return reference() is None


@families
@pytest.mark.parametrize("kind", [cache_for, static_cache])
def test_a_steered_cache_is_freed_when_it_is_dropped(family, kind):
    model, inputs = steered(family), prompt(family)
    cache = kind(model)
    logits(model, inputs, saying(family, inputs), **with_cache(model, cache))
    logits(model, {"input_ids": torch.tensor([[5]])}, **with_cache(model, cache))
    reference = weakref.ref(cache)
    del cache
    assert is_freed(reference)


@families
def test_a_cache_that_the_model_made_is_freed_with_its_output(family):
    model, inputs = steered(family), prompt(family)
    with torch.no_grad():
        if family == "qwen2":
            with use_saliency(model, look(inputs)):
                output = model(**inputs, use_cache=True)
        else:
            output = model(**inputs, use_cache=True)
    reference = weakref.ref(output.past_key_values)
    del output
    assert is_freed(reference)


@families
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_the_cache_of_a_generate_is_freed_with_its_output(family, how):
    model, inputs = steered(family), prompt(family)
    output = generate(model, inputs, saying(family, inputs), return_dict_in_generate=True, **how)
    reference = weakref.ref(output.past_key_values)
    del output
    assert is_freed(reference)


@pytest.mark.parametrize("act", [
    lambda cache: cache.reorder_cache(torch.tensor([0])), lambda cache: cache.batch_select_indices(torch.tensor([0])),
    lambda cache: cache.batch_repeat_interleave(2), lambda cache: cache.crop(-2), lambda cache: cache.reset(),
], ids=["reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset"])  # fmt: skip
def test_a_cache_whose_rows_moved_is_freed(act):
    model, inputs = steered("qwen2"), prompt("qwen2")
    cache = cache_for(model)
    logits(model, inputs, look(inputs), **with_cache(model, cache))
    act(cache)
    reference = weakref.ref(cache)
    del cache
    assert is_freed(reference)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_does_not_keep_its_original(copied):
    model, inputs = steered("qwen2"), prompt("qwen2")
    cache = cache_for(model)
    logits(model, inputs, look(inputs), **with_cache(model, cache))
    twin, reference = copied(cache), weakref.ref(cache)
    del cache
    assert is_freed(reference)
    assert torch.isfinite(logits(model, {"input_ids": torch.tensor([[5]])}, **with_cache(model, twin))).all()
    own = weakref.ref(twin)
    del twin
    assert is_freed(own)


def test_a_call_that_failed_keeps_no_cache():
    model, inputs = steered("qwen2"), prompt("qwen2")
    cache = cache_for(model)

    def stop(module, args):
        raise MemoryError("injected")

    hook = model.get_decoder().layers[2].register_forward_pre_hook(stop)
    with pytest.raises(MemoryError):
        logits(model, inputs, look(inputs), **with_cache(model, cache))
    hook.remove()
    reference = weakref.ref(cache)
    del cache
    assert is_freed(reference)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl", "llava"])
def test_plain_models_and_their_caches_are_freed(family):
    """Or the other tests show nothing."""
    model = make_encoder_model(family) if family == "llava" else make_model(family)
    inputs = make_encoder_inputs(family) if family == "llava" else prompt(family)
    cache = cache_for(model)
    logits(model, inputs, **with_cache(model, cache))
    output = generate(model, inputs, return_dict_in_generate=True, num_beams=2)
    references = [weakref.ref(thing) for thing in (model, cache, output.past_key_values, model.get_decoder().layers[0])]
    del model, cache, output
    assert all(is_freed(reference) for reference in references)


@families
def test_an_unpatched_model_is_freed(family):
    model, inputs = steered(family), prompt(family)
    logits(model, inputs, saying(family, inputs))
    generate(model, inputs, saying(family, inputs))
    with use_strength(model, 1.0), trace_steering(model):
        logits(model, inputs, saying(family, inputs))
    unpatch_model(model)
    reference = weakref.ref(model)
    del model
    assert is_freed(reference)


@families
def test_what_was_inside_an_unpatched_model_is_freed(family):
    model = steered(family)
    steering, layer = weakref.ref(model.hf_steer), weakref.ref(model.get_decoder().layers[0])
    unpatch_model(model)
    assert is_freed(steering)
    del model
    assert is_freed(layer)


@pytest.mark.parametrize("placement", ["output", "layers", "projector"])
def test_an_unpatched_model_with_aligners_is_freed(placement):
    config = SteerConfig(aligners=(AlignerConfig(modality="image", placement=placement),))
    model = patch_model(make_encoder_model("llava"), config)
    logits(model, make_encoder_inputs("llava"))
    unpatch_model(model)
    reference = weakref.ref(model)
    del model
    assert is_freed(reference)


def test_patching_again_and_again_keeps_nothing():
    model, references = make_model("qwen2"), []
    for strength in (1.0, 2.0, 3.0):
        patch_model(model, steer("qwen2", strength=strength))
        references.append(weakref.ref(model.hf_steer))
        unpatch_model(model)
    assert all(is_freed(reference) for reference in references)


def test_a_statement_is_freed_with_its_block():
    model, inputs = steered("qwen2"), prompt("qwen2")
    said = look(inputs)
    logits(model, inputs, said)
    logits(model, inputs, saliency=said)
    reference = weakref.ref(said)
    del said
    assert is_freed(reference)
