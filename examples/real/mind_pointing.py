"""A box turns the gaze: what the joined model says when it is pointed at one of four things, and under each control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mind_scenes import SIDE_PX, Scene
from mind_tower import PATCH_PX
from mind_training import BEFORE, PROMPT, Look, answers_of, look_into, named
from tqdm.auto import tqdm

import hf_steer
from hf_steer import Saliency
from hf_steer.analysis import find_grounding_heads
from hf_steer.analysis.heads import HeadExample
from hf_steer.evidence.pointing import wilson_interval

Heads = Mapping[int, Sequence[int]]
CELLS = 4
PATCHES = SIDE_PX // PATCH_PX


@dataclass(frozen=True)
class Condition:
    """One way to be pointed, or not.

    Attributes:
        name: as the table calls it.
        heads: layer -> heads; None for all.
        strength: λ.
        aim: where the gaze goes: the asked cell, another one, as many patches by lot, the whole picture, or None: no gaze.
        few: whether λ is the one that was chosen for few heads.
        scenes: how many; all when None.
    """

    name: str
    heads: Heads | None = None
    strength: float = 0.0
    aim: str | None = "asked"
    few: bool = False
    scenes: int | None = None

    @property
    def strengths(self) -> Any:
        if self.heads is None:
            return self.strength
        return {layer: {head: self.strength for head in heads} for layer, heads in self.heads.items()}

    @property
    def told(self) -> str:
        """The heads, as a table says them."""
        if self.heads is None:
            return "all"
        return " ".join(f"{layer}:{','.join(map(str, own))}" for layer, own in self.heads.items())


class Pointing:
    """Scenes of four with one asked for, the joined model, and its answers.

    Args:
        model: joined, every head of it within reach.
        processor: its own.
        names: of all things.
        scenes: of four.
        seed: of what is asked and drawn by lot.
    """

    def __init__(self, model: Any, processor: Any, names: Sequence[str], scenes: Sequence[Scene], *, seed: int) -> None:
        self.model, self.processor, self.names, self.scenes = model, processor, names, scenes
        random = np.random.default_rng(seed)
        self.asked = random.integers(CELLS, size=len(scenes))
        self.other = (self.asked + random.integers(1, CELLS, size=len(scenes))) % CELLS
        self.lots = [random.permutation(PATCHES**2)[: PATCHES**2 // CELLS] for _ in scenes]

    def run(self, condition: Condition) -> dict[str, Any]:
        """One row of the table: shares of the answers, with 95 % intervals."""
        numbers = range(len(self.scenes))[: condition.scenes]
        scenes = [self.scenes[number] for number in numbers]
        looks = None if condition.aim is None else [self._look(condition.aim, number) for number in numbers]
        with hf_steer.use_strength(self.model, condition.strengths) if looks else nullcontext():
            words = [named(answer) for answer in answers_of(self.model, self.processor, scenes, looks)]
        shown = [[self.names[name] for name in scene.names] for scene in scenes]
        right = [word == things[cell] for word, things, cell in zip(words, shown, self.asked, strict=False)]
        row = share("right", right)
        row |= share("another", [word in things and not hit for word, things, hit in zip(words, shown, right, strict=True)])
        if condition.aim == "other":
            row |= share("boxed", [word == things[cell] for word, things, cell in zip(words, shown, self.other, strict=False)])
        return {
            "condition": condition.name, "heads": condition.told if looks else "", "strength": condition.strength if looks else 0.0,
            "n": len(scenes), **row, "readable": sum(word is not None for word in words) / len(words),
        }  # fmt: skip

    def _look(self, aim: str, number: int) -> Look:
        scene = self.scenes[number]
        if aim == "uniform":
            return look_into((0, 0, SIDE_PX, SIDE_PX))
        if aim == "shuffled":
            spread = np.zeros(PATCHES**2, dtype=np.float32)
            spread[self.lots[number]] = 1
            return lambda row: Saliency.from_map(spread.reshape(PATCHES, PATCHES), image_size=(SIDE_PX, SIDE_PX), row=row)
        return look_into(scene.boxes[(self.asked if aim == "asked" else self.other)[number]])


def share(name: str, hits: Sequence[bool]) -> dict[str, float]:
    """A share of answers, with its 95 % interval (Wilson)."""
    low, high = wilson_interval(sum(hits), len(hits))
    return {name: sum(hits) / len(hits), f"{name}_low": low, f"{name}_high": high}


def find_heads(pointing: Pointing, count: int) -> dict[str, Heads]:
    """Rule -> the heads that, where the unsteered model has chosen one of four things, look at that one as it says its name."""
    words = [named(answer) for answer in answers_of(pointing.model, pointing.processor, pointing.scenes)]
    examples = []
    for scene, word in zip(pointing.scenes, words, strict=True):
        things = [pointing.names[name] for name in scene.names]
        box = scene.boxes[things.index(word) if word in things else 0]
        inputs = pointing.processor(text=PROMPT + BEFORE, images=scene.image, return_tensors="pt")
        examples.append(HeadExample(dict(inputs), Saliency.from_boxes(box, scene.image)))
    result = find_grounding_heads(pointing.model, examples, count=count, rule="selectivity", null_sets=2)
    return {rule: by_layer(result.rankings[rule][:count]) for rule in ("selectivity", "pointing")}


def by_layer(heads: Sequence[tuple[int, int]]) -> Heads:
    return {layer: tuple(sorted(head for own, head in heads if own == layer)) for layer in sorted({layer for layer, _ in heads})}


def random_heads(like: Heads, per_layer: int, seed: int, *, layers: int | None = None) -> Heads:
    """As many heads, of the same layers; or, where a number of layers is given, from anywhere."""
    random = np.random.default_rng(seed)
    if layers is None:
        return {layer: tuple(sorted(map(int, random.choice(per_layer, len(own), replace=False)))) for layer, own in like.items()}
    count = sum(map(len, like.values()))
    drawn = random.choice(layers * per_layer, count, replace=False)
    return by_layer([(int(number) // per_layer, int(number) % per_layer) for number in drawn])


def choose_strength(rows: Sequence[Mapping[str, Any]]) -> float:
    """The smallest λ within one answer in a hundred of the best."""
    best = max(row["right"] for row in rows)
    return float(min(row["strength"] for row in rows if row["right"] >= best - 0.01))


@torch.no_grad()
def same_text(model: Any, alone: Any, processor: Any, prompts: Sequence[str], *, tokens: int) -> int:
    """Prompts without a picture that the joined model answers with the very tokens of the decoder alone, logits bit-equal."""
    same = 0
    for prompt in tqdm(prompts, desc="text alone", leave=False):
        messages = [{"role": "user", "content": prompt}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        words = alone.config.vocab_size
        bits = torch.equal(model(**inputs).logits[..., :words], alone(**inputs).logits)
        own, other = (one.generate(**inputs, max_new_tokens=tokens, do_sample=False) for one in (model, alone))
        same += bits and torch.equal(own, other)
    return same
