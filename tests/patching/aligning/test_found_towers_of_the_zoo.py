"""Aligners in every architecture of the installed transformers that sees or hears, and that the kit knows how to show something."""

from __future__ import annotations

import pytest
import torch
import transformers
from kit.architectures import classes, modalities
from kit.perceived import shown, suited

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
