"""Tiny examples for the search of grounding heads, and their scores in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kit import tiny_encoders
from kit.tiny import HEADS, IMAGE, IMPLEMENTATIONS, LAYERS, SEEING, VIDEO, make_prompt, pad_rows

from hf_steer import patch_model, unpatch_model, use_saliency
from hf_steer.analysis import HeadExample

LISTENING = {"qwen2_audio": 10, "voxtral": 5}
LOOKING = {"llava": 9, "llava_onevision": 30}
"""LLaVAs -> tokens of a picture; above, of a sound. OneVision's, crops and newlines among them, form no one grid."""
EVERYTHING = [(family, implementation) for family in (*SEEING, *LISTENING, *LOOKING) for implementation in IMPLEMENTATIONS]
every = pytest.mark.parametrize(("family", "implementation"), EVERYTHING)
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""Two kernels with other orders of summation, three layers of fp32."""


def make_inputs(family, seed, *, pictures=1, tail=4):
    """One row: a picture of 3 x 4 tokens, two of them and a video, or a sound; its last `tail` tokens are text."""
    if family in SEEING:
        items = [("image", 3, 4)] if pictures == 1 else [("image", 2, 3), 2, ("video", 2, 2, 2), 1, ("image", 3, 2)]
        return make_prompt(family, [[3, *items, tail]], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    count = {**LISTENING, **LOOKING}[family]
    words = torch.randint(2, 80, (3 + tail,), generator=generator).tolist()
    inputs = pad_rows([[*words[:3], *[IMAGE] * count, *words[3:]]], padding="left")
    if family in LISTENING:
        inputs["input_features"] = torch.randn(1, tiny_encoders.MELS, 2 * tiny_encoders.FRAMES, generator=generator)
    if family == "qwen2_audio":
        inputs["feature_attention_mask"] = torch.ones(1, 2 * tiny_encoders.FRAMES, dtype=torch.long)
    if family == "llava":
        inputs["pixel_values"] = torch.randn(1, 3, 12, 12, generator=generator)
    if family == "llava_onevision":
        inputs["pixel_values"] = torch.randn(1, 3, 3, 12, 12, generator=generator)
        inputs["image_sizes"] = torch.tensor([[12, 24]])
    return inputs


def media_of(inputs):
    ids = inputs["input_ids"][0]
    return [*(ids == IMAGE).nonzero().flatten().tolist(), *(ids == VIDEO).nonzero().flatten().tolist()]


def make_example(family, seed, *, answer=True, **kwargs):
    inputs = make_inputs(family, seed, **kwargs)
    random = np.random.default_rng(seed)
    media = media_of(inputs)
    span = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
    span[random.choice(media, int(random.integers(1, 4)), replace=False)] = True
    return HeadExample(inputs, span, answer=int(random.integers(2, 80)) if answer else None)


def make_examples(family, count, *, first=0, **kwargs):
    """Prompts of two lengths, so that they do not all fit into one batch."""
    return [make_example(family, first + number, tail=4 + number % 2, **kwargs) for number in range(count)]


def grids_of(family, inputs):
    """Frames, height and width of the pictures in tokens, images before videos; a sound is a line."""
    if family == "llava":
        return [(1, 3, 3)]
    if family not in SEEING:
        return [(1, 1, LISTENING[family])]
    sizes = [inputs[name].tolist() for name in ("image_grid_thw", "video_grid_thw") if name in inputs]
    return [(frames, height // 2, width // 2) for size in sizes for frames, height, width in size]


def components_of(cells):
    """Sets of 8-connected cells, by flood fill."""
    left, found = set(cells), []
    while left:
        stack, own = [left.pop()], set()
        while stack:
            row, column = stack.pop()
            own.add((row, column))
            for near in [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    stack.append(near)
        found.append(own)
    return found


def entropy_of(values, grids):
    mean = sum(values) / len(values)
    weights, start = [], 0
    for frames, height, width in grids:
        for _ in range(frames):
            frame = values[start : start + height * width]
            over = [(place, value - mean) for place, value in enumerate(frame) if value > mean * (1 + 1e-6)]
            above = {(place // width, place % width): excess for place, excess in over}
            weights += [sum(above[cell] for cell in own) for own in components_of(above)]
            start += height * width
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights) if weights else math.log(len(values))


def scores_of(model, family, examples):
    """The attention scores from the weights that eager attention returns."""
    sums, entropies = {}, np.zeros((len(examples), LAYERS, HEADS))
    for number, example in enumerate(examples):
        with torch.no_grad():
            attentions = model(**example.inputs, output_attentions=True).attentions
        media, marked = media_of(example.inputs), set(example.span.nonzero().flatten().tolist())
        for layer in range(LAYERS):
            for head in range(HEADS):
                weights = [float(attentions[layer][0, head, example.query, key]) for key in media]
                on = sum(w for w, key in zip(weights, media, strict=True) if key in marked)
                off = sum(weights) - on
                values = {
                    "mass": on + off,
                    "span_mass": on,
                    "selectivity": on - off / (len(media) - len(marked)) * len(marked),
                    "pointing": float(media[weights.index(max(weights))] in marked),
                }
                for name, value in values.items():
                    sums.setdefault(name, np.zeros((LAYERS, HEADS)))[layer, head] += value / len(examples)
                if family != "llava_onevision":
                    entropies[number, layer, head] = entropy_of(weights, grids_of(family, example.inputs))
    return sums if family == "llava_onevision" else {**sums, "entropy": entropies.mean(0)}


def elbow_of(values):
    curve = sorted(values)
    last = len(curve) - 1
    distance = []
    for place, value in enumerate(curve):
        across, up = last, curve[-1] - curve[0]  # the chord, from the first point
        distance.append(abs(across * (value - curve[0]) - up * place) / math.hypot(across, up))
    return curve[distance.index(max(distance))]


def localisation_of(mass, entropies):
    heads = [(layer, head) for layer in range(mass.shape[0]) for head in range(mass.shape[1])]
    over = [place for place in heads if mass[place] >= elbow_of(mass.flatten().tolist())]
    votes = np.zeros(mass.shape)
    for table in entropies:
        for place in sorted(over, key=lambda place: (table[place], -mass[place]))[:10]:
            votes[place] += 1 / len(entropies)
    return votes


def log_p_of(model, example, config, statement):
    patch_model(model, config)
    try:
        with torch.no_grad(), use_saliency(model, statement):
            logits = model(**example.inputs).logits[0, example.query].double()
    finally:
        unpatch_model(model)
    return float(torch.log_softmax(logits, -1)[example.answer]), int(logits.argmax() == example.answer)
