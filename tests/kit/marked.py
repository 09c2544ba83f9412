"""Examples whose span lies in a text, or in what an encoder hands on, and their scores in plain loops."""

from __future__ import annotations

import wave

import numpy as np
import torch
from kit.crossing import make_crossing_inputs
from kit.tiny import pad_rows

from hf_steer import Saliency
from hf_steer.analysis import HeadExample

PLACES, STEP_SECONDS = 50, 0.02
"""Of the tiny Whisper's encoder."""


def text_example(seed, *, answer=True, most=80, among=False):
    """A prompt of 9 to 17 tokens, two or three of which are pointed at."""
    random = np.random.default_rng(seed)
    length = int(random.integers(9, 18))
    inputs = pad_rows([random.integers(2, most, length).tolist()], padding="left")
    span, start = torch.zeros(length, dtype=torch.bool), int(random.integers(1, length - 4))
    span[start : start + int(random.integers(2, 4))] = True
    rest = torch.arange(length) % 2 == 0
    return HeadExample(inputs, span, answer=int(random.integers(2, most)) if answer else None, among=rest | span if among else None)


def text_examples(count, *, first=0, **kwargs):
    return [text_example(first + number, **kwargs) for number in range(count)]


def sound_example(seed, *, answer=True, tokens=4):
    """A sound for the tiny Whisper, a tenth of a second of which is pointed at."""
    inputs = make_crossing_inputs("whisper", rows=1, tokens=tokens)
    generator = torch.Generator().manual_seed(seed)
    inputs["input_features"] = torch.randn(inputs["input_features"].shape, generator=generator)
    start = (seed % 7) / 10
    return HeadExample(inputs, Saliency.from_seconds((start, start + 0.1)), answer=5 + seed % 80 if answer else None)


def sound_examples(count, *, first=0, **kwargs):
    """Of two lengths."""
    return [sound_example(first + number, tokens=4 + number % 2, **kwargs) for number in range(count)]


def places_of(example):
    """Positions that a text's span is compared with."""
    length = example.inputs["input_ids"].shape[1]
    return list(range(1, length)) if example.among is None else example.among.nonzero().flatten().tolist()


def heard_places(example):
    """Positions that a stretch of seconds covers by half or more: a position lies around its middle."""
    (region,) = example.span.regions
    ((start, end),) = region.paint.spans
    found = []
    for place in range(PLACES):
        low, high = (place - 0.5) * STEP_SECONDS, (place + 0.5) * STEP_SECONDS
        covered = max(0.0, min(high, end) - max(low, start)) / STEP_SECONDS
        if covered >= 0.5 - 1e-9:
            found.append(place)
    return found


def loops_over(weights, places, marked):
    """`(layers, heads)` of each score, from one example's `(layers, heads, keys)` weights."""
    layers, heads, _ = weights.shape
    tables = {name: np.zeros((layers, heads)) for name in ("mass", "span_mass", "selectivity", "pointing")}
    for layer in range(layers):
        for head in range(heads):
            own = {place: float(weights[layer, head, place]) for place in places}
            on = sum(value for place, value in own.items() if place in marked)
            off = sum(own.values()) - on
            tables["mass"][layer, head] = on + off
            tables["span_mass"][layer, head] = on
            tables["selectivity"][layer, head] = on - off / (len(places) - len(marked)) * len(marked)
            tables["pointing"][layer, head] = float(max(own, key=own.__getitem__) in marked)
    return tables


def tone(path, seconds=0.5, rate=8000, width=2, channels=1):
    """A WAV file of one tone; its path."""
    samples = np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        whole = 2 ** (8 * width - 1) - 1
        values = (samples * whole + (128 if width == 1 else 0)).astype({1: np.uint8, 2: "<i2", 4: "<i4"}[width])
        file.writeframes(np.repeat(values, channels).tobytes())
    return path
