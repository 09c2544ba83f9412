"""Tiny models that steer their gaze: configurations, prompts of unequal rows, what is said, and what comes out."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from kit.tiny import (
    FAMILIES,
    IMPLEMENTATIONS,
    READING,
    SEEING,
    make_prompt,
)
from kit.versions import CHUNKS_PICTURES

from hf_steer import (
    AttentionConfig,
    Saliency,
    SaliencyConfig,
    SteerConfig,
    use_saliency,
)

EVERYTHING = [(family, implementation) for family in FAMILIES for implementation in IMPLEMENTATIONS]
SIGHTED = [(family, implementation) for family in SEEING for implementation in IMPLEMENTATIONS]
CHUNKABLE = EVERYTHING if CHUNKS_PICTURES else [case for case in EVERYTHING if case[0] in READING]
every = pytest.mark.parametrize(("family", "implementation"), EVERYTHING)
sighted = pytest.mark.parametrize(("family", "implementation"), SIGHTED)
HEADS_STEERED = {1: (0, 3), -1: "all"}
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""Two kernels with other orders of summation, three layers of fp32."""


def steer(family, *, strength=2.0, **attention):
    source = attention.pop("source", "vision_attention" if family in SEEING else None)
    normalize = attention.pop("normalize", "zscore")
    preserve_mass = attention.pop("preserve_mass", False)
    saliency = SaliencyConfig(source=source, normalize=normalize, preserve_mass=preserve_mass)
    return SteerConfig(
        attention=AttentionConfig(
            heads=attention.pop("heads", HEADS_STEERED), strength=strength, saliency=saliency, **{"queries": "all", **attention}
        )
    )


def prompt_for(family, *, padding="left", rows=None):
    if rows is None:
        rows = [[3, ("image", 2, 3), 4, ("image", 3, 2), 5], [6], [2, ("image", 2, 2), 3]]
    if family in READING:
        rows = [[sum(item if isinstance(item, int) else 6 for item in row)] for row in rows]
    return make_prompt(family, rows, padding=padding)


def gaze(family, inputs, seed=0):
    """What steers this family in these tests: its own eyes, or scores that the user supplies."""
    if family in SEEING:
        return None
    generator = torch.Generator().manual_seed(seed)
    return Saliency.from_tokens(torch.randn(inputs["input_ids"].shape, generator=generator))


def looking(model, statement):
    return nullcontext() if statement is None else use_saliency(model, statement)


@torch.no_grad()
def logits(model, inputs, statement=None, **kwargs):
    with looking(model, statement):
        return model(**inputs, **kwargs).logits


def real_logits(values, inputs):
    return values[inputs["attention_mask"].bool()]


def row_of(inputs, row, family):
    """One row of a batch, without its padding."""
    keep = inputs["attention_mask"][row].bool()
    cut = {name: inputs[name][row : row + 1][:, keep] for name in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in inputs:
        cut["mm_token_type_ids"] = inputs["mm_token_type_ids"][row : row + 1][:, keep]
    if "image_grid_thw" in inputs:
        tokens = inputs["image_grid_thw"].prod(1)
        counts = (inputs["mm_token_type_ids"] == 1).sum(1) * 4
        owner, filled = [], [0] * len(counts)
        for count in tokens.tolist():
            place = next(index for index in range(len(counts)) if filled[index] + count <= counts[index])
            filled[place] += count
            owner.append(place)
        chosen = [index for index, place in enumerate(owner) if place == row]
        if chosen:
            cut["image_grid_thw"] = inputs["image_grid_thw"][chosen]
            cut["pixel_values"] = torch.cat([inputs["pixel_values"].split(tokens.tolist())[index] for index in chosen])
    return cut


def generate(model, inputs, statement=None, **kwargs):
    """Sequences, and the logits of each new token."""
    with looking(model, statement):
        out = model.generate(
            **inputs, do_sample=False, return_dict_in_generate=True, output_logits=True, **{"max_new_tokens": 4, **kwargs}
        )
    return out.sequences, torch.stack(out.logits, 1)
