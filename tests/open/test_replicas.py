"""nn.DataParallel runs shallow replicas whose hooks belong to the original: refused, with what to use instead."""

from __future__ import annotations

import pytest
import torch
from kit.asking import logits, look, prompt, saying, steered
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model
from torch import nn

from hf_steer import AlignerConfig, PatchError, SteerConfig, disable_steering, patch_model, use_saliency


def replica_of(model):
    """What `torch.nn.parallel.replicate` makes, but on the same device."""
    modules = list(model.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        copy = copies[id(module)]
        copy._former_parameters = {}
        for name, child in module._modules.items():
            if child is not None:
                copy._modules[name] = copies[id(child)]
                setattr(copy, name, copies[id(child)])
        for name, parameter in module._parameters.items():
            if parameter is None:
                copy._parameters[name] = None
            else:  # a replica's parameters are plain tensors
                setattr(copy, name, parameter.detach().clone())
                copy._former_parameters[name] = getattr(copy, name)
        for name, buffer in module._buffers.items():
            copy._buffers[name] = buffer
    return copies[id(model)]


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_a_replica_of_a_steered_model_is_refused(family):
    model, inputs = steered(family), prompt(family)
    expected = logits(model, inputs, saying(family, inputs))
    copy = replica_of(model)
    said = saying(family, inputs)
    with torch.no_grad(), pytest.raises(PatchError, match="(?s)DataParallel.*torchrun"):
        copy(**inputs, **({} if said is None else {"saliency": said}))
    assert torch.equal(logits(model, inputs, said), expected)  # the original is untouched


def test_a_replica_inside_a_block_is_refused():
    model, inputs = steered("qwen2"), prompt("qwen2")
    with torch.no_grad(), pytest.raises(PatchError, match="(?s)DataParallel.*torchrun"), use_saliency(model, look(inputs)):
        replica_of(model)(**inputs)


def test_a_replica_of_an_aligned_model_is_refused():
    model = patch_model(make_encoder_model("llava"), SteerConfig(aligners=(AlignerConfig(modality="image", init="normal"),)))
    inputs = make_encoder_inputs("llava")
    with torch.no_grad(), pytest.raises(PatchError, match="(?s)DataParallel.*torchrun"):
        replica_of(model)(**inputs)


def test_a_replica_inside_disable_steering_runs():
    model, inputs = steered("qwen2"), prompt("qwen2")
    copy = replica_of(model)
    with torch.no_grad(), disable_steering(model):
        assert torch.equal(copy(**inputs).logits, model(**inputs).logits)


def test_the_wrapper_without_devices_calls_the_model_itself():
    """On a machine without a GPU DataParallel is a plain wrapper, which is steered as ever."""
    if torch.cuda.is_available():
        pytest.skip("DataParallel would replicate to the GPU")
    model, inputs = steered("qwen2"), prompt("qwen2")
    said = look(inputs)
    assert torch.equal(logits(nn.DataParallel(model), inputs, said), logits(model, inputs, said))
