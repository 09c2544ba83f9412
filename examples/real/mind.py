"""Both halves on one real mind: a small picture tower, SmolLM2, an aligner between them, and a box that turns the gaze.

    python examples/real/mind.py --mind FOLDER     # all of it; FOLDER holds SmolLM2-135M-Instruct as transformers reads it
    python examples/real/mind.py --preset quick    # tiny stand-ins, nothing downloaded: does it run?

The tower is trained here to name what lies under each of its patches, on emoji of two artists (npm packages, see
`mind_pictures.py`), and then frozen; SmolLM2 is frozen from the start. `hf_steer.compose` joins them. What is trained between: a
linear projection alone, or one and an aligner, to answer "What is it?" with the name of the one thing in the picture, or of any of
four. No place is ever said in training. Then a box says which of the four, by attention alone. Sets of four names of the report
stand together in no training scene; heads and strengths are chosen on a third split. Every step is kept in the cache, so that a
run that was stopped goes on. Writes mind.csv and mind.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mind_standins
import numpy as np
import torch
import transformers
from kept import kept, write_csv
from mind_figure import draw
from mind_pictures import NAMES, default_cache, fetch_pictures
from mind_pointing import Condition, Heads, Pointing, choose_strength, find_heads, random_heads, same_text, share
from mind_scenes import Painter, Scene
from mind_tower import train_tower
from mind_training import KINDS, LINEAR, LOADED, Look, answers_of, join, look_into, named, start_projector, train, word_ids
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hf_steer
from hf_steer.analysis.provenance import content_hash

HERE = Path(__file__).parent
ARTISTS, UNSEEN = ("twitter", "google"), "fluent"
MIDDLE = 3.0
"""λ with which trainings are compared, and at which a model that is saved stands."""
REPORTED = "simple"
"""The kind of aligner whose first model is pointed: settled before anything was measured."""
PROMPTS = (
    "What is the capital of France?", "Name three fruits.", "Write a sentence about the sea.", "What is two plus three?",
    "Who wrote Hamlet?", "Translate 'good morning' into Spanish.", "Give me a word that rhymes with cat.", "What is a bridge?",
    "Tell me a joke.", "How do I boil an egg?", "What colour is the sky?", "List the days of the week.", "What is photosynthesis?",
    "Write a line of Python that prints hello.", "Why do leaves fall?", "What is the opposite of cold?", "Describe a rocket.",
    "What does a doctor do?", "Which animal barks?", "Say goodbye politely.",
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """How much to run.

    Attributes:
        tower_steps: to train the tower.
        started_from: scenes to which the projection is fitted first.
        steps: to train what is between.
        seeds: trainings of each kind.
        scenes: of the report.
        choosing: scenes that choose heads and strengths.
        strengths: the grid of λ.
        heads: how many to find.
        sets: of random heads.
        prompts: without a picture.
    """

    tower_steps: int
    started_from: int
    steps: int
    seeds: int
    scenes: int
    choosing: int
    strengths: tuple[float, ...]
    heads: int
    sets: int
    prompts: int


PRESETS = {
    "full": Preset(1600, 400, 150, 3, 300, 100, (1.0, 2.0, 3.0, 4.0, 6.0, 8.0), 10, 10, 20),
    "quick": Preset(6, 20, 3, 1, 12, 40, (1.0, 4.0), 3, 2, 2),
}


class Bench:
    """The parts, made once and kept: pictures, tower, decoder, and what was trained between.

    Args:
        preset: how much.
        cache: folder for what is kept.
        mind: folder of the decoder; None for the stand-ins.
    """

    def __init__(self, preset: Preset, cache: Path, mind: Path | None) -> None:
        self.preset = preset
        self.names: Sequence[str] = NAMES if mind else mind_standins.NAMES
        pictures = fetch_pictures(cache, self.names) if mind else mind_standins.draw_pictures()
        self.pictures = np.stack([pictures[artist] for artist in ARTISTS])
        self.unseen = pictures[UNSEEN][None]
        self.seen = cache / f"mind-tower-{content_hash([self.pictures, preset.tower_steps])}"
        self.folder = cache / f"mind-{content_hash([self.pictures, dataclasses.astuple(preset)])}"
        for folder in (self.seen, self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.mind = mind or mind_standins.write_decoder(self.folder / "decoder")
        self.tiny = mind is None

    def kept(self, name: str, make: Any, folder: Path | None = None) -> Any:
        """What a step returned, now or in a run before."""
        return kept(folder or self.folder, name, make)

    def tower(self) -> Any:
        steps = self.preset.tower_steps
        return self.kept("tower", lambda: train_tower(self.pictures, self.seen, steps=steps, seed=0, tiny=self.tiny), self.seen)

    def scenes(self, split: str, count: int, *, pictures: np.ndarray | None = None, seed: int) -> list[Scene]:
        painter = Painter(self.pictures if pictures is None else pictures, seed)
        return [painter.four(split) for _ in range(count)]

    def trial(self, kind: str, seed: int) -> Any:
        return self.kept(f"{kind.split()[0]}-{seed}", lambda: self._trial(kind, seed))

    def _trial(self, kind: str, seed: int) -> dict[str, Any]:
        """Train what is between the two, and let it name and point."""
        torch.manual_seed(seed)
        model, processor = join(self.seen, self.mind, kind, strength=MIDDLE)
        start_projector(model, word_ids(processor, self.names), Painter(self.pictures, 1000), count=self.preset.started_from)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        losses = train(model, processor, self.names, Painter(self.pictures, 2000 + seed), steps=self.preset.steps)
        for parameter in trained:  # not model.to(...), which would round the rotary frequencies, too
            parameter.data = parameter.data.to(torch.bfloat16)
        if kind == REPORTED and seed == 0:
            for part in (model, processor):
                part.save_pretrained(self.folder / "joined")
        painter = Painter(self.pictures, 3000)
        ones = [painter.one() for _ in range(self.preset.scenes)]
        fours = self.scenes("report", self.preset.scenes, seed=3001)
        said = {
            "one thing": answers_of(model, processor, ones), "any of four": answers_of(model, processor, fours),
            "pointed": answers_of(model, processor, fours, self.looks(fours)),
        }  # fmt: skip
        asked = [(scene.names[number % 4],) for number, scene in enumerate(fours)]
        right = {"one thing": [one.names for one in ones], "any of four": [four.names for four in fours], "pointed": asked}
        words = {task: [[self.names[name] for name in names] for names in rows] for task, rows in right.items()}
        return {
            "said": said["pointed"], "loss": float(np.mean(losses[-20:])), "parameters": sum(map(torch.Tensor.numel, trained)),
            "hits": {task: [named(one) in own for one, own in zip(said[task], words[task], strict=True)] for task in said},
        }  # fmt: skip

    def looks(self, scenes: Sequence[Scene]) -> list[Look]:
        """Into the first cell of the first scene, the second of the second, and so on."""
        return [look_into(scene.boxes[number % 4]) for number, scene in enumerate(scenes)]

    def loaded(self) -> tuple[Any, Any]:
        """The reported model as anybody loads it, and its processor."""
        model = hf_steer.from_pretrained(self.folder / "joined", **LOADED).eval()
        return model, transformers.AutoProcessor.from_pretrained(self.folder / "joined")


def pointing_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """The table of the gaze, on the model as it was loaded from its folder."""
    preset = bench.preset
    model, processor = bench.loaded()
    shape = model.config.text_config.num_hidden_layers, model.config.text_config.num_attention_heads
    choosing = Pointing(model, processor, bench.names, bench.scenes("choosing", preset.choosing, seed=4000), seed=4001)
    kept = bench.kept("heads", lambda: [[rule, list(heads.items())] for rule, heads in find_heads(choosing, preset.heads).items()])
    found = {rule: {layer: tuple(own) for layer, own in heads} for rule, heads in kept["value"]}
    grids: dict[str, list[Any]] = {}
    for name, heads in {"all": None, **found}.items():
        conditions = [Condition(f"{name} heads", heads, strength) for strength in preset.strengths]
        grids[name] = list(measured(bench, choosing, conditions, f"choosing-{name}"))
        yield from ({"table": "choosing", **row} for row in grids[name])
    rule = max(found, key=lambda rule: max(row["right"] for row in grids[rule]))
    soft, hard = choose_strength(grids["all"]), choose_strength(grids[rule])
    report = Pointing(model, processor, bench.names, bench.scenes("report", preset.scenes, seed=5000), seed=5001)
    conditions = conditions_of(preset, f"found heads ({rule})", found[rule], shape, soft, hard)
    for condition, row in zip(conditions, measured(bench, report, conditions, "report"), strict=True):
        chosen = condition.aim is None or condition.strength == (hard if condition.few else soft)
        yield {"table": "pointing", "chosen": int(chosen), **row}
    scenes = bench.scenes("report", preset.scenes, pictures=bench.unseen, seed=7000)
    stranger = Pointing(model, processor, bench.names, scenes, seed=7001)
    conditions = [Condition("unseen artist, unsteered", aim=None), Condition("unseen artist, all heads", None, soft)]
    yield from ({"table": "pointing", "chosen": 1, **row} for row in measured(bench, stranger, conditions, "unseen"))


def conditions_of(
    preset: Preset, name: str, few: Heads, shape: tuple[int, int], soft: float, hard: float
) -> list[Condition]:
    """All rows of the report: λ grids, controls, and sets of random heads.

    Args:
        preset: grid and number of sets.
        name: of the found heads.
        few: the found heads.
        shape: layers, and heads in each.
        soft: λ that was chosen for all heads.
        hard: λ that was chosen for the found ones.
    """
    layers, per_layer = shape
    third = {layer: tuple(range(per_layer)) for layer in range(layers * 2 // 3, layers)}
    conditions = [Condition("unsteered", aim=None)]
    conditions += [Condition("all heads", None, strength) for strength in preset.strengths]
    conditions += [Condition(name, few, strength, few=True) for strength in preset.strengths]
    for aim in ("other", "shuffled", "uniform"):
        conditions.append(Condition(f"all heads, {aim}", None, soft, aim))
        conditions.append(Condition(f"found heads, {aim}", few, hard, aim, few=True))
    conditions.append(Condition("last third of the layers", third, soft))
    for where, drawn in (("same layers", None), ("anywhere", layers)):
        for number in range(preset.sets):
            heads = random_heads(few, per_layer, 6000 + number, layers=drawn)
            conditions.append(Condition(f"random heads, {where}", heads, hard, few=True, scenes=preset.scenes // 3))
    return conditions


def measured(bench: Bench, pointing: Pointing, conditions: Sequence[Condition], name: str) -> Iterator[dict[str, Any]]:
    """Row after row, each measured once."""
    for number, condition in enumerate(tqdm(conditions, desc=name)):
        yield bench.kept(f"{name}-{number}", lambda condition=condition: pointing.run(condition))["value"]


def text_row(bench: Bench) -> dict[str, Any]:
    """Answers without a picture, against those of the decoder alone."""

    def measure() -> int:
        model, processor = bench.loaded()
        alone = AutoModelForCausalLM.from_pretrained(bench.mind, **LOADED).eval()
        return same_text(model, alone, processor, PROMPTS[: bench.preset.prompts], tokens=24)

    same, count = bench.kept("text", measure)["value"], bench.preset.prompts
    return {"table": "text", "condition": "tokens as the decoder's alone", "n": count, "right": same / count}


def saved_row(bench: Bench, trial: Any) -> dict[str, Any]:
    """What the saved and loaded model says when pointed, against what it said before it was saved."""
    said = trial["value"]["said"][:100]

    def measure() -> int:
        model, processor = bench.loaded()
        scenes = bench.scenes("report", len(said), seed=3001)
        again = answers_of(model, processor, scenes, bench.looks(scenes))
        return sum(one == other for one, other in zip(said, again, strict=True))

    same = bench.kept("saved", measure)["value"]
    return {"table": "saved", "condition": "answers as before saving", "n": len(said), "right": same / len(said)}


def aligner_rows(bench: Bench, trials: Mapping[tuple[str, int], Any], *, draws: int = 2000) -> Iterator[dict[str, Any]]:
    """Every kind beside linear alone: means over seeds, paired differences with a bootstrap over seeds and scenes."""
    random = np.random.default_rng(0)
    kinds = {kind: [trial for (own, _), trial in trials.items() if own == kind] for kind in KINDS}
    for task in ("one thing", "any of four", "pointed"):
        hits = {kind: np.array([one["value"]["hits"][task] for one in own], dtype=float) for kind, own in kinds.items() if own}
        for kind, own in hits.items():
            gaps, base = [], hits[LINEAR][: len(own)]
            for _ in range(draws):
                picked, seeds = random.integers(own.shape[1], size=own.shape[1]), random.integers(len(own), size=len(own))
                gaps.append((own - base)[seeds][:, picked].mean())
            low, high = np.quantile(gaps, (0.025, 0.975))
            first = kinds[kind][0]["value"]
            yield {
                "table": "aligners", "condition": f"{kind}: {task}", "n": own.size, "seeds": len(own),
                "parameters": first["parameters"], "loss": float(np.mean([one["value"]["loss"] for one in kinds[kind]])),
                "cpu_seconds": float(np.mean([one["cpu_seconds"] for one in kinds[kind]])),
                **share("right", own.astype(bool).flatten().tolist()),
                "less_linear": float((own - base).mean()), "less_linear_low": low, "less_linear_high": high,
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--mind", type=Path, help="folder of SmolLM2-135M-Instruct; not with --preset quick")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--seeds", type=int, help="trainings of each kind, instead of the preset's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE.parent / "figures")
    given = parser.parse_args()
    if (given.mind is None) == (given.preset == "full"):
        parser.error("the full preset needs --mind, the folder of SmolLM2-135M-Instruct; the quick one has a decoder of its own.")
    torch.set_num_threads(given.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    started = time.perf_counter()
    bench = Bench(PRESETS[given.preset], given.cache, given.mind)
    tower = bench.tower()
    rows = [{"table": "tower", "condition": f"patches named, {name}", "right": right} for name, right in tower["value"].items()]
    seeds = range(bench.preset.seeds if given.seeds is None else given.seeds)
    first = bench.trial(REPORTED, 0)
    rows += [*pointing_rows(bench), text_row(bench), saved_row(bench, first)]
    trials = {(kind, seed): bench.trial(kind, seed) for seed in tqdm(seeds, desc="trainings") for kind in KINDS}
    rows += aligner_rows(bench, trials)
    given.output.mkdir(parents=True, exist_ok=True)
    write_csv(given.output / "mind.csv", rows, bench.folder.name)
    draw(rows, given.output / "mind.png")
    for row in rows:
        print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}))
    print(f"{len(rows)} rows in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
