"""Tiny models with an ear or an eye and an aligner in every place."""

from __future__ import annotations

import pytest
import torch
from kit.tiny_encoders import (
    ENCODING,
    PROJECTING,
    make_encoder_model,
    modality_of,
)

from hf_steer import (
    AlignerConfig,
    SteerConfig,
    patch_model,
)

PLACES = (
    ("output", "progressive"), ("layers", "layer_wise"), ("layers", "hierarchical"), ("projector", "simple"),
    ("projector", "cross_modal_adapter"), ("projector", "cross_modal_features"), ("projector", "modality_specific"),
    ("projector", "merged"),
)  # fmt: skip
EVERYTHING = [(family, *place) for family in ENCODING for place in PLACES if place[0] != "projector" or family in PROJECTING]
THREADED = [case for case in EVERYTHING if case[0] in ("whisper", "llava", "qwen2_vl")]
MASKED = [case for case in EVERYTHING if case[0] in ("wav2vec2", "hubert", "qwen2_audio")]
PROMPTED = [case for case in EVERYTHING if case[0] in PROJECTING]
every = pytest.mark.parametrize(("family", "placement", "kind"), EVERYTHING)
prompted = pytest.mark.parametrize(("family", "placement", "kind"), PROMPTED)
TOLERANCE = {"rtol": 1e-4, "atol": 3e-5}
"""Other orders of summation, a few layers of fp32."""


def align(family, placement, kind, **options):
    if kind == "merged":
        kind, options = "progressive", {"merge": True, **options}
    if kind in ("cross_modal_adapter", "cross_modal_features"):
        options = {"hidden_dim": 16, "num_heads": 4, **options}
    return SteerConfig(aligners=(AlignerConfig(modality=modality_of(family), placement=placement, kind=kind, **options),))


def aligned(family, placement, kind, *, seed=0, **options):
    """A patched model whose aligner is far from fresh."""
    model = patch_model(make_encoder_model(family, seed=seed), align(family, placement, kind, **options))
    stir(model)
    return model


def stir(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.hf_steer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)


@torch.no_grad()
def logits(model, inputs, **kwargs):
    return model(**inputs, **kwargs).logits


def generate(model, inputs, **kwargs):
    out = model.generate(
        **inputs, do_sample=False, return_dict_in_generate=True, output_logits=True, **{"max_new_tokens": 4, **kwargs}
    )
    return out.sequences, torch.stack(out.logits, 1)


def whole(inputs, sequences):
    """The inputs of one pass over what was generated."""
    extra = sequences.shape[1] - inputs["input_ids"].shape[1]
    longer = {"input_ids": sequences, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, extra), value=1)}
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, extra))
    return {**inputs, **longer}


def row_of(inputs, row, family):
    """One row of a batch, without its padding: the first has two pictures or sounds, the second one, the third none."""
    keep = inputs["attention_mask"][row].bool()
    tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    cut = {name: inputs[name][row : row + 1][:, keep] for name in tokens if name in inputs}
    chosen = {0: [0, 1], 1: [2], 2: []}[row]
    if not chosen:
        return cut
    if "image_grid_thw" in inputs:
        patches = inputs["image_grid_thw"].prod(1).tolist()
        parts = inputs["pixel_values"].split(patches)
        return {
            **cut, "image_grid_thw": inputs["image_grid_thw"][chosen], "pixel_values": torch.cat([parts[item] for item in chosen])
        }
    return {**cut, **{name: value[chosen] for name, value in inputs.items() if name not in tokens}}
