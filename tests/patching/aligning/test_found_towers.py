"""Aligners where structure put them: fresh they change nothing, trained they alone learn, and no padding goes from row to row."""

from __future__ import annotations

import pytest
import torch
from kit.perceived import shown
from kit.tiny_towers import CONFIGS, make_tower_model

from hf_steer import AlignerConfig, SteerConfig, patch_model, unpatch_model
from hf_steer.families import resolve
from hf_steer.patching.aligning.building import laid_out_as
from hf_steer.registry import FAMILIES

PLACED = [(kind, placement) for kind in CONFIGS for placement in ("output", "layers")]


def align(modality, placement):
    return SteerConfig(aligners=(AlignerConfig(modality=modality, placement=placement),))


def stir(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.hf_steer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))


@pytest.fixture(params=PLACED, ids=lambda case: "-".join(case))
def case(request):
    """A model without a row, something to show it, what comes out, and the same model patched."""
    kind, placement = request.param
    assert kind not in FAMILIES or not FAMILIES[kind].encoders
    model, modality = make_tower_model(kind), CONFIGS[kind][0]
    show = shown(model, modality, resolve(model).encoders[modality].outlet)
    with torch.no_grad():
        plain = show.features(model)
    return patch_model(model, align(modality, placement)), show, plain


@torch.no_grad()
def test_a_fresh_aligner_changes_no_bit_and_a_learned_one_does(case):
    model, show, plain = case
    assert all(map(torch.equal, show.features(model), plain))
    stir(model)
    assert not any(map(torch.equal, show.features(model), plain))
    unpatch_model(model)
    assert all(map(torch.equal, show.features(model), plain))


def test_the_aligner_learns_and_nothing_else(case):
    model, show, _ = case
    asking = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert asking
    assert all(name.startswith("hf_steer.") for name in asking)
    sum(own.square().sum() for own in show.features(model)).backward()
    assert all(bool(own.grad.any()) for name, own in asking.items() if name.endswith("steering_vectors"))


@pytest.mark.parametrize("placement", ["output", "layers"])
@torch.no_grad()
def test_what_lies_in_padding_goes_to_no_other_row(placement):
    model = make_tower_model("glmasr")
    encoder = resolve(model).encoders["audio"]
    show = shown(model, "audio", encoder.outlet)
    patch_model(model, align("audio", placement))
    stir(model)
    assert encoder.mask in show.named
    mask = show.named[encoder.mask] = show.named[encoder.mask].clone()
    mask[1, mask.shape[1] // 2 :] = 0
    (before,) = show.features(model)
    sound = show.named["input_features"] = show.named["input_features"].clone()
    sound[1, :, mask.shape[1] // 2 :] = 7.0
    (after,) = show.features(model)
    tokens = before.shape[0] * 2 // 3  # the first row's, beside the half of the second that is real
    assert torch.equal(before[:tokens], after[:tokens])


def test_steered_features_lie_in_memory_as_they_did():
    features = torch.randn(2, 4, 3).transpose(1, 2)
    steered = (features.contiguous() * 2).requires_grad_()
    found = laid_out_as(steered, features)
    assert found.stride() == features.stride() != steered.stride()
    assert torch.equal(found, steered)
    found.sum().backward()
    assert torch.equal(steered.grad, torch.ones(2, 3, 4))
