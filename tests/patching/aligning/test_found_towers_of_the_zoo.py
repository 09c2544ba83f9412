"""Aligners in every architecture of the installed transformers that sees or hears, and that the kit knows how to show something."""

from __future__ import annotations

import pytest
import torch
import transformers
from kit.architectures import classes, modalities
from kit.perceived import Shown, shown, suited

from hf_steer import AlignerConfig, SteerConfig, patch_model, unpatch_model
from hf_steer.families import resolve
from hf_steer.testing.zoo import tiny_model

NEWEST = transformers.__version__.startswith("5.24")
NOT_SHOWN = {
    *((kind, "image") for kind in (
        "granite4_vision", "granite_docling", "inkling2", "inkling2_loop", "llama4", "mllama", "molmo2", "muse_glimmer",
        "muse_spark", "phi4_multimodal", "vision-encoder-decoder",
    )),
    *((kind, "audio") for kind in (
        "dots3_note", "granite_speech", "granite_speech5_ctc", "granite_speech_plus", "nemo_speechlm", "phi4_multimodal", "voxtral",
    )),
}  # fmt: skip
"""The kit makes nothing that these take, or the zoo's sizes do not fit together there; where aligners go is tested without."""
CASES = [(kind, modality) for kind, own in classes().items() for modality in modalities(own)]


def model_of(kind):
    try:
        return suited(tiny_model(kind)).eval().requires_grad_(False)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])


@pytest.mark.parametrize(("kind", "modality"), CASES)
def test_an_aligner_is_inert_when_fresh_learns_alone_and_can_be_taken_out(kind, modality):
    if (kind, modality) in NOT_SHOWN:
        pytest.skip("the kit has nothing to show it")
    model = model_of(kind)
    anatomy = resolve(model)
    encoder = anatomy.encoders.get(modality)
    if encoder is None:
        assert anatomy.no_encoder[modality]
        return
    placements = [placement for placement in ("output", "layers") if placement not in encoder.lacks]
    if not placements:
        assert encoder.placeholder_ids
        return
    try:
        show = shown(model, modality, encoder.outlet)
    except AssertionError as error:
        if NEWEST:
            raise
        pytest.skip(str(error).splitlines()[-1])
    with torch.no_grad():
        plain = show.features(model)
    for placement in placements:
        patch_model(model, SteerConfig(aligners=(AlignerConfig(modality=modality, placement=placement),)))
        found = show.features(model)
        assert all(map(torch.equal, found, plain))
        asking = {name: own for name, own in model.named_parameters() if own.requires_grad}
        assert all(name.startswith("hf_steer.") for name in asking)
        vectors = [own for name, own in asking.items() if name.endswith("steering_vectors")]
        generator = torch.Generator().manual_seed(1)
        loss = sum((own * torch.randn(own.shape, generator=generator)).sum() for own in found)
        reached = torch.autograd.grad(loss, vectors, allow_unused=True)
        assert all(own is not None and bool(own.any()) for own in reached)
        with torch.no_grad():
            for own in vectors:
                own.add_(torch.randn(own.shape, generator=generator))
            assert not all(map(torch.equal, show.features(model), plain))
            unpatch_model(model)
            assert all(map(torch.equal, show.features(model), plain))


SOUNDS = ("input_features", "input_values", "audio_input_features")


def told_of_padding(show, mask, content):
    """The same sounds, whose second ends halfway, with something behind its end."""
    (sound,) = (name for name in SOUNDS if name in show.named)
    heard = show.named[sound].clone()
    length = show.named[mask].shape[-1] if mask in show.named else max(heard.shape[1:])
    real, half = torch.ones(heard.shape[0], length, dtype=torch.long), length // 2
    real[1, half:] = 0
    axis = next(axis for axis in range(heard.ndim - 1, 0, -1) if heard.shape[axis] == length)
    heard[1].narrow(axis - 1, half, length - half).fill_(content)
    return Shown(show.owner, show.method, {**show.named, mask: real, sound: heard})


@pytest.mark.parametrize("kind", [kind for kind, modality in CASES if modality == "audio" and (kind, modality) not in NOT_SHOWN])
@torch.no_grad()
def test_what_lies_in_padding_matters_no_more_with_an_aligner_than_without(kind):
    model = model_of(kind)
    encoder = resolve(model).encoders.get("audio")
    placements = [] if encoder is None else [name for name in ("output", "layers") if name not in encoder.lacks]
    if not placements or encoder.mask is None:
        pytest.skip("it is told of no padding")
    show = shown(model, "audio", encoder.outlet)
    both = [told_of_padding(show, encoder.mask, content) for content in (0.0, 7.0)]

    def untouched():
        return [one == other for one, other in zip(*(sounds.features(model) for sounds in both), strict=True)]

    try:
        plain = untouched()
    except Exception as error:  # the prompt has as many tokens as the whole sound
        pytest.skip(str(error).splitlines()[-1])
    assert any(bool(same.any()) for same in plain)
    for placement in placements:
        patch_model(model, SteerConfig(aligners=(AlignerConfig(modality="audio", placement=placement),)))
        generator = torch.Generator().manual_seed(1)
        for own in model.hf_steer.parameters():
            own.add_(torch.randn(own.shape, generator=generator))
        assert all(bool(own[same].all()) for own, same in zip(untouched(), plain, strict=True))
        unpatch_model(model)
