"""Does steering help? Answers of the embedded model on held-out digits: by head set, strength, source of saliency, and gate.

    python examples/steer_tiny_r1_vl.py                  # the figures of docs/evidence.md
    python examples/steer_tiny_r1_vl.py --preset quick --output /tmp/quick

Four questions, each with its controls. Heads, strengths and sources are chosen on pictures of training digits and reported on
held-out ones; every row of the table says which split it is from. Shares have 95 % Wilson intervals.

- pointing: the question leaves open which digit is meant, saliency lies on one of them. By heads (found, random fours, all) and λ.
- clutter: the question names the place, specks lie over the picture. Does the model's own gaze help, by any source?
- long: an open question whose thought may not end before its 24th token, twice as long as the model thinks by itself. Steering all
  heads without preserving the picture's mass pulls attention off the text: does it destroy the thought, and does a gate save it?
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, LogitsProcessor
from transformers.utils import logging

import hf_steer
from hf_steer import AttentionConfig, GateConfig, SaliencyConfig, SteerConfig
from hf_steer.analysis import find_grounding_heads
from hf_steer.analysis.plots.canvas import AFTER, BEFORE, CONTROLS, save, subplots
from hf_steer.embedded import embedded_model_dir
from hf_steer.evidence import digits
from hf_steer.evidence.pointing import ANSWER, Pointing, wilson_interval
from hf_steer.evidence.scenes import digit_examples
from hf_steer.files import write_whole

HERE = Path(__file__).parent
LONG_TOKENS = 24
SPECKS = 40
SOURCES = ("vision_attention", "vision_rollout", "feature_norm", "text_similarity", "decoder_attention", "gradient")
GATES: dict[str, dict[str, Any]] = {
    "always": {},
    "generated queries": {"queries": "generated"},
    "thinking": {"queries": "thinking"},
    "answer": {"queries": "answer"},
    "entropy": {"gate": GateConfig(kind="entropy", threshold=0.1, release=0.05)},
    "entropy, z-score": {"gate": GateConfig(kind="entropy", zscore=True)},
    "margin": {"gate": GateConfig(kind="margin", threshold=0.2, release=0.4)},
    "self-report": {"gate": GateConfig(kind="self_report", phrases=("Let me look",), hold_tokens=64)},
}
PRESETS = {
    "full": {"scenes": 200, "strengths": (1.0, 2.0, 4.0, 8.0), "random_sets": 5, "head_examples": 200, "rule": "forward"},
    "quick": {"scenes": 6, "strengths": (8.0,), "random_sets": 1, "head_examples": 20, "rule": "effect"},
}


Condition = tuple[str, str, str, Any]
"""Saliency, name of the heads, gate, and the heads themselves; the model is patched for it while it is yielded."""


@dataclass(frozen=True)
class Row:
    """One condition on one split.

    Attributes:
        task: `pointing`, `clutter` or `long`.
        split: `choosing` (training digits) or `report` (held-out digits).
        saliency: what it lies on, or the model's source.
        heads: which.
        gate: when.
        strength: λ.
        right: share of answers that name the digit in question, with its interval.
        low: its lower end.
        high: its upper end.
        readable: share that closes the thought and then names one digit of the picture.
        nats: mean negative log-likelihood per token of what was said, under the unsteered model.
        scenes: how many.
    """

    task: str
    split: str
    saliency: str
    heads: str
    gate: str
    strength: float
    right: float
    low: float
    high: float
    readable: float
    nats: float
    scenes: int


class ThinkOn(LogitsProcessor):
    """Forbids tokens before a number of new ones has been said."""

    def __init__(self, forbidden: list[int], prompt: int, least: int) -> None:
        self.forbidden, self.prompt, self.least = forbidden, prompt, least

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] - self.prompt >= self.least:
            return scores
        scores = scores.clone()
        scores[:, self.forbidden] = -torch.inf
        return scores


class Bench:
    """The model on the scenes of one split and task."""

    def __init__(self, task: str, split: str, scenes: int, seed: int) -> None:
        part = {"choosing": "training", "report": "held-out"}[split]
        drawn = digits.sample_scenes(digits.load_digits(part), scenes, seed=seed)
        self.task, self.split = task, split
        if task == "clutter":
            drawn = [speckled(scene, seed=seed + number) for number, scene in enumerate(drawn)]
        self.world = Pointing(embedded_model_dir(), drawn, seed=seed)
        if task == "clutter":
            places = digits.PLACES[2, 2]
            self.world.questions = [
                digits.PLACE_QUESTIONS[number % 3].format(place=places[cell]) for number, cell in enumerate(self.world.cells)
            ]
        self.model = hf_steer.unpatch_model(self.world.model)
        self.batches = [list(range(start, min(start + 50, scenes))) for start in range(0, scenes, 50)]
        self.inputs = [self.world.inputs(batch) for batch in self.batches]
        tokenizer = self.world.processor.tokenizer
        newlines = [token for token in range(len(tokenizer)) if "\n" in tokenizer.decode([token])]
        self.endings = [*newlines, *tokenizer.convert_tokens_to_ids(["</think>", "<|im_end|>"])]

    @contextmanager
    def patched(self, *, source: str | None, preserve_mass: bool, gate: dict[str, Any]) -> Iterator[None]:
        options = {"source_heads": "all"} if source == "decoder_attention" else {}
        saliency = SaliencyConfig(source=source, normalize="zscore", preserve_mass=preserve_mass, **options)
        config = SteerConfig(attention=AttentionConfig(strength=1.0, saliency=saliency, **gate))
        hf_steer.patch_model(self.model, config, tokenizer=self.world.processor)
        try:
            yield
        finally:
            hf_steer.unpatch_model(self.model)

    def measure(self, saliency: str, heads: str, gate: str, strength: float, chosen: Any) -> Row:
        """Run one condition on the patched model; `chosen` are its heads."""
        said, nats, counts = [], 0.0, 0
        for batch, inputs in zip(self.batches, self.inputs, strict=True):
            told = saliency in ("pointed-at", "another cell", "shuffled", "uniform")
            kind = {"pointed-at": "pointed-at cell"}.get(saliency, saliency)
            with self.strength(strength, chosen):
                if told:
                    with hf_steer.use_saliency(self.model, self.world.saliency(kind, batch)):
                        tokens = self.generate(inputs)
                else:
                    tokens = self.generate(inputs)
            own, number = self.likelihood(inputs, tokens)
            nats, counts = nats + own, counts + number
            new = tokens[:, inputs["input_ids"].shape[1] :]
            said += self.world.processor.batch_decode(new, skip_special_tokens=True)
        digits_said = [int(found.group(1)) if (found := ANSWER.search(text)) else None for text in said]
        scenes, cells = self.world.scenes, self.world.cells
        right = sum(digit == scene.labels[cell] for digit, scene, cell in zip(digits_said, scenes, cells, strict=True))
        readable = sum(digit in scene.labels for digit, scene in zip(digits_said, scenes, strict=True))
        low, high = wilson_interval(right, len(said))
        share = right / len(said), low, high, readable / len(said), nats / counts
        return Row(self.task, self.split, saliency, heads, gate, strength, *share, len(said))

    @contextmanager
    def strength(self, strength: float, chosen: Any) -> Iterator[None]:
        wanted = strength if chosen == "all" else {layer: dict.fromkeys(own, strength) for layer, own in chosen.items()}
        with hf_steer.use_strength(self.model, wanted):
            yield

    def generate(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        least = LONG_TOKENS if self.task == "long" else 0
        processor = ThinkOn(self.endings, inputs["input_ids"].shape[1], least)
        with torch.no_grad():
            return self.model.generate(**inputs, max_new_tokens=least + 40, do_sample=False, logits_processor=[processor])

    @torch.no_grad()
    def likelihood(self, inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> tuple[float, int]:
        """Summed negative log-likelihood of what was said under the unsteered model, and how many tokens that is."""
        prompt = inputs["input_ids"].shape[1]
        pad = self.world.processor.tokenizer.pad_token_id
        real = tokens[:, prompt:] != pad
        whole = dict(inputs, input_ids=tokens, attention_mask=torch.cat([inputs["attention_mask"], real.long()], 1))
        types = inputs["mm_token_type_ids"]
        whole["mm_token_type_ids"] = torch.cat([types, types.new_zeros(real.shape)], 1)
        with hf_steer.disable_steering(self.model):
            logits = self.model(**whole).logits[:, prompt - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, prompt:], reduction="none")
        return float((losses * real).sum()), int(real.sum())


def speckled(scene: digits.Scene, *, seed: int) -> digits.Scene:
    """Dark specks of 2 x 2 pixels all over the picture."""
    random = np.random.default_rng(seed)
    pixels = np.array(scene.image)
    for x, y in random.integers(0, pixels.shape[0] - 1, (SPECKS, 2)):
        pixels[y : y + 2, x : x + 2] = random.integers(0, 160)
    return dataclasses.replace(scene, image=Image.fromarray(pixels))


def find_heads(examples: int, rule: str, seed: int) -> dict[int, tuple[int, ...]]:
    """Four heads, chosen on training digits alone."""
    folder = embedded_model_dir()
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    chosen = digit_examples(folder, "training", 2 * examples, seed=seed)
    found = find_grounding_heads(model, chosen, count=4, rule=rule, null_sets=1, seed=seed)
    return {layer: tuple(own) for layer, own in found.heads.items()}


def random_sets(number: int, seed: int) -> list[dict[int, tuple[int, ...]]]:
    random = np.random.default_rng(seed)
    sets = []
    for _ in range(number):
        heads: dict[int, list[int]] = {}
        for place in sorted(random.choice(24, 4, replace=False)):
            heads.setdefault(int(place) // 6, []).append(int(place) % 6)
        sets.append({layer: tuple(own) for layer, own in heads.items()})
    return sets


def pointing(bench: Bench, four: Any, fours: list[Any]) -> Iterator[Condition]:
    """Open questions, the picture's mass preserved: found heads, random fours, all heads; then the controls."""
    randoms = [(f"random four {number + 1}", own) for number, own in enumerate(fours)]
    with bench.patched(source=None, preserve_mass=True, gate={}):
        for heads, chosen in (("found four", four), ("all", "all"), *randoms):
            yield "pointed-at", heads, "always", chosen
        for saliency in ("another cell", "shuffled", "uniform"):
            yield saliency, "found four", "always", four


def clutter(bench: Bench, four: Any, fours: list[Any]) -> Iterator[Condition]:
    """Closed questions on specked pictures: the model's own gaze by every source, pointing as the upper end, and controls."""
    for saliency in (*SOURCES, "pointed-at", "shuffled"):
        with bench.patched(source=saliency if saliency in SOURCES else None, preserve_mass=True, gate={}):
            yield saliency, "found four", "always", four
            yield saliency, "all", "always", "all"
            if saliency == "vision_attention":
                yield saliency, "random four 1", "always", fours[0]


def long(bench: Bench, four: Any, fours: list[Any]) -> Iterator[Condition]:
    """Long thoughts, the picture's mass not preserved: every gate on all heads, fewer heads, and shuffled saliency."""
    for gate, options in GATES.items():
        with bench.patched(source=None, preserve_mass=False, gate=options):
            yield "pointed-at", "all", gate, "all"
            if gate in ("always", "margin"):
                yield "shuffled", "all", gate, "all"
                yield "pointed-at", "found four", gate, four
                yield "pointed-at", "random four 1", gate, fours[0]


TASKS = {"pointing": pointing, "clutter": clutter, "long": long}


def run(preset: dict[str, Any], seed: int) -> tuple[list[Row], dict[int, tuple[int, ...]]]:
    scenes = preset["scenes"]
    four, fours = find_heads(preset["head_examples"], preset["rule"], seed), random_sets(preset["random_sets"], seed)
    rows: list[Row] = []
    for number, split in enumerate(("choosing", "report")):
        for task, conditions in TASKS.items():
            bench = Bench(task, split, scenes, seed + 10 * number)
            unsteered = None
            for saliency, heads, gate, chosen in tqdm(conditions(bench, four, fours), desc=f"{task}, {split}", unit="condition"):
                named = {"saliency": saliency, "heads": heads, "gate": gate}
                # strength 0 is bit-equal to the unpatched model, whatever the condition, so it is measured once
                unsteered = unsteered or bench.measure(saliency, heads, gate, 0.0, chosen)
                rows.append(dataclasses.replace(unsteered, **named))
                rows += [bench.measure(saliency, heads, gate, strength, chosen) for strength in preset["strengths"]]
    return rows, four


def chosen_strengths(rows: list[Row]) -> dict[tuple[str, str, str, str], float]:
    """Task, saliency, heads, gate -> the λ above 0 that was best on the choosing split; the smaller one of equals."""
    best: dict[tuple[str, str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.strength):
        key = (row.task, row.saliency, row.heads, row.gate)
        if row.split == "choosing" and row.strength > 0 and (key not in best or row.right > best[key].right):
            best[key] = row
    return {key: row.strength for key, row in best.items()}


def summary(rows: list[Row]) -> list[Row]:
    """The report split: unsteered, and each condition at the strength that the other split chose."""
    best = chosen_strengths(rows)
    shown = []
    for task in ("pointing", "clutter", "long"):
        own = [row for row in rows if row.task == task and row.split == "report"]
        shown += [dataclasses.replace(next(row for row in own if row.strength == 0), saliency="nothing", heads="none", gate="")]
        shown += [row for row in own if best.get((row.task, row.saliency, row.heads, row.gate)) == row.strength]
    return shown


def to_csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue().encode()


def draw(rows: list[Row], path: Path) -> Path:
    """Three panels on the report split: pointing by heads, own gaze by source, long thoughts by gate."""
    report = [row for row in rows if row.split == "report"]
    figure, (first, second, third) = subplots(1, 3, size=(14, 4.2))
    for name, colour, style in (("found four", AFTER, "-o"), ("all", CONTROLS[0], "-s")):
        _curve(first, [row for row in report if row.task == "pointing" and row.heads == name and row.saliency == "pointed-at"],
               colour, style, f"{name} heads" if name == "all" else "found four of 24 heads")
    randoms = [row for row in report if row.task == "pointing" and row.heads.startswith("random")]
    for number, name in enumerate(dict.fromkeys(row.heads for row in randoms)):
        own = [row for row in randoms if row.heads == name]
        first.plot([row.strength for row in own], [row.right for row in own], color=BEFORE, linewidth=1,
                   label="random fours" if number == 0 else None)
    first.set_title("open question, pointed at one digit", fontsize=10)
    colours = (*CONTROLS, AFTER, "#7d5ba6", "#1b998b", BEFORE)
    for source, colour in zip(dict.fromkeys(row.saliency for row in report if row.task == "clutter"), colours, strict=False):
        own = [row for row in report if row.task == "clutter" and row.saliency == source and row.heads == "found four"]
        _curve(second, own, colour, "-o", source)
    second.set_title("place named, specks: the model's own gaze, found four", fontsize=10)
    for gate, colour in zip(GATES, colours, strict=False):
        own = [row for row in report if (row.task, row.gate, row.heads, row.saliency) == ("long", gate, "all", "pointed-at")]
        _curve(third, own, colour, "-o", gate)
    third.set_title("long thoughts, all heads, mass not kept: gates", fontsize=10)
    for axis in (first, second, third):
        axis.set_xlabel("strength λ")
        axis.set_ylim(-0.02, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    first.set_ylabel("right answers")
    return save(figure, path)


def _curve(axis: Any, rows: list[Row], colour: str, style: str, label: str) -> None:
    share = np.array([row.right for row in rows])
    errors = np.clip([share - [row.low for row in rows], [row.high for row in rows] - share], 0, None)
    axis.errorbar([row.strength for row in rows], share, errors, fmt=style, color=colour, capsize=2, markersize=4, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--output", type=Path, default=HERE / "figures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    rows, four = run(PRESETS[arguments.preset], arguments.seed)
    write_whole(arguments.output / "steering.csv", to_csv(rows))
    write_whole(arguments.output / "steering_summary.csv", to_csv(summary(rows)))
    draw(rows, arguments.output / "steering.png")
    print(f"found heads: {four}")
    for row in summary(rows):
        print(
            f"{row.task:<9} {row.saliency:<18} {row.heads:<14} {row.gate:<18} λ {row.strength:<4g} right {row.right:.2f} "
            f"[{row.low:.2f}, {row.high:.2f}]  readable {row.readable:.2f}  {row.nats:.2f} nats/token"
        )


if __name__ == "__main__":
    main()
