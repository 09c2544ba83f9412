"""Does the gaze decide? The embedded model is asked an open question about a grid of digits and is pointed at one cell."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_steer.analysis.prompts import messages_for
from hf_steer.config import AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.embedded import embedded_model_dir as embedded_model_dir
from hf_steer.evidence.digits import OPEN_QUESTIONS, Scene, load_digits, sample_scenes
from hf_steer.ground.arguments import Given, named
from hf_steer.ground.outputs import logits_in
from hf_steer.io import from_pretrained
from hf_steer.patching import disable_steering, patch_model, unpatch_model, use_saliency
from hf_steer.saliency import Saliency

STRENGTHS = (2.0, 4.0, 8.0, 10.0, 12.0, 16.0)
BATCH = 32
ANSWER = re.compile(r"</think>\s*(\d)\s*$")


@dataclass(frozen=True)
class PointingRow:
    """One condition, over all its scenes.

    Attributes:
        saliency: what the saliency was on.
        strength: λ.
        pointed_share: share of answers that name the pointed-at digit, with its 95 % Wilson interval.
        low: its lower end.
        high: its upper end.
        readable_share: share of answers that name any digit of the picture after a closed thought.
        kl_nats: mean KL(unsteered ‖ steered) of the answer's distribution after the same thought.
        scenes: how many.
    """

    saliency: str
    strength: float
    pointed_share: float
    low: float
    high: float
    readable_share: float
    kl_nats: float
    scenes: int


@dataclass(frozen=True)
class PointingResult:
    """The table, the strength that was chosen on other scenes, and a few scenes to look at."""

    rows: tuple[PointingRow, ...]
    best_strength: float
    examples: tuple[Example, ...]

    def to_csv(self) -> str:
        """The table, a header first."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [item.name for item in fields(PointingRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()


@dataclass(frozen=True)
class Example:
    """One scene: where it was pointed at, and the ten digits' probabilities before and after."""

    scene: Scene
    cell: int
    question: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    answer_before: str
    answer_after: str


CELL_OF = {"pointed-at cell": 0, "mass not kept": 0, "another cell": 1}
"""Condition -> how many cells after the pointed-at one its saliency lies."""


@contextmanager
def even_on_purpose() -> Iterator[None]:
    """For uniform saliency as a control: users are warned that it changes nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="what is pointed at covers")
        yield


def pointing_config(strength: float, *, preserve_mass: bool = True) -> SteerConfig:
    """All heads; the bias moves attention within the picture and leaves the text its share, unless told otherwise."""
    saliency = SaliencyConfig(source=None, preserve_mass=preserve_mass)
    return SteerConfig(attention=AttentionConfig(heads="all", strength=strength, saliency=saliency))


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927), which stays inside [0, 1] at the ends."""
    z = 1.959963984540054
    share, spread = hits / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return centre - half, centre + half


class Pointing:
    """Scenes with a pointed-at cell each, the model, and its answers.

    Args:
        folder: of a model in the manner of the embedded one.
        scenes: pictures of four different digits.
        seed: of the pointed-at cells and the questions.
    """

    def __init__(self, folder: str | os.PathLike[str], scenes: Sequence[Scene], *, seed: int) -> None:
        from transformers import AutoProcessor

        random = np.random.default_rng(seed)
        self.scenes = list(scenes)
        self.cells = random.integers(0, 4, len(self.scenes)).tolist()
        self.questions = [OPEN_QUESTIONS[number] for number in random.integers(0, len(OPEN_QUESTIONS), len(self.scenes))]
        self.shuffled_cells = random.integers(0, 4, len(self.scenes)).tolist()
        self.model = from_pretrained(folder, steer_config=pointing_config(1.0)).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.digit_ids = self.processor.tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)])

    def batches(self, title: str) -> Iterator[list[int]]:
        """Numbers of the scenes, batch by batch, under a progress bar."""
        numbers = list(range(len(self.scenes)))
        batches = [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]
        yield from tqdm(batches, desc=f"{title:<24}", unit="batch", leave=False)

    def inputs(self, batch: list[int]) -> dict[str, Tensor]:
        """As Qwen2-VL's users build them: messages, chat template, process_vision_info, processor."""
        from qwen_vl_utils import process_vision_info

        messages = [messages_for(self.scenes[number].image, self.questions[number]) for number in batch]
        texts = [self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in messages]
        images, _ = process_vision_info(messages)
        return dict(self.processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left"))

    def saliency(self, kind: str, batch: list[int]) -> Saliency:
        """What is said about each scene of a batch: one of the conditions of `run_pointing`."""
        total = Saliency()
        for row, number in enumerate(batch):
            scene, cell = self.scenes[number], self.cells[number]
            if kind == "uniform":
                part = Saliency.from_mask(np.ones((2, 2)), row=row)
            else:
                place = self.shuffled_cells[number] if kind == "shuffled" else (cell + CELL_OF[kind]) % 4
                part = Saliency.from_boxes(scene.boxes[place], scene.image, row=row)
            total = total + part
        return total

    @contextmanager
    def steered(self, kind: str, strength: float, batch: list[int]) -> Iterator[None]:
        """The model under one condition."""
        if kind == "nothing":
            with disable_steering(self.model):
                yield
            return
        patch_model(unpatch_model(self.model), pointing_config(strength, preserve_mass=kind != "mass not kept"))
        with even_on_purpose(), use_saliency(self.model, self.saliency(kind, batch)):
            yield

    def answers(self, kind: str, strength: float) -> list[str]:
        """What the model says, greedily, thought included."""
        said: list[str] = []
        for batch in self.batches(f"{kind}, λ = {strength:g}"):
            inputs = self.inputs(batch)
            with self.steered(kind, strength, batch):
                tokens = self.model.generate(**inputs, max_new_tokens=40, do_sample=False)
            said += self.processor.batch_decode(tokens[:, Given(inputs).ids.shape[1] :], skip_special_tokens=True)
        return said

    @torch.no_grad()
    def distributions(self, kind: str, strength: float, thoughts: Sequence[str]) -> Tensor:
        """`(scenes, vocabulary)` log-probabilities of the answer after given thoughts."""
        found = []
        for batch in self.batches(f"KL, λ = {strength:g}"):
            inputs = self.inputs(batch)
            given, ends = Given(inputs), Given(self.processor.tokenizer(
                [thoughts[number] for number in batch], return_tensors="pt", padding=True, padding_side="right",
                add_special_tokens=False,
            ))  # fmt: skip
            inputs |= named(
                ids=torch.cat([given.ids, ends.ids], 1),
                mask=torch.cat([given.mask, ends.mask], 1),
                token_kinds=torch.cat([given.token_kinds, given.token_kinds.new_zeros(ends.ids.shape)], 1),
            )
            with self.steered(kind, strength, batch):
                logits = logits_in(self.model(**inputs))
            last = logits.shape[1] - ends.mask.shape[1] + ends.mask.sum(1) - 1
            found.append(torch.log_softmax(logits[torch.arange(len(batch)), last].float(), -1))
        return torch.cat(found)


def run_pointing(
    *,
    folder: str | os.PathLike[str] | None = None,
    scenes: int = 120,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    examples: int = 3,
) -> PointingResult:
    """Measure the share of answers that name the pointed-at digit, on held-out pictures, beside the controls.

    The strength of the controls is chosen on as many other scenes of held-out pictures, half as many as are reported.

    Args:
        folder: model; the embedded one when None.
        scenes: how many are reported.
        seed: of scenes, cells and questions.
        strengths: λ to try.
        examples: scenes to keep for pictures.
    """
    folder = embedded_model_dir() if folder is None else folder
    held_out = load_digits("held-out")
    every = sample_scenes(held_out, scenes + max(1, scenes // 2), seed=seed)
    choosing = Pointing(folder, every[scenes:], seed=seed + 1)
    best = max(strengths, key=lambda value: _hits(choosing, choosing.answers("pointed-at cell", value)))
    pointing = Pointing(folder, every[:scenes], seed=seed)
    unsteered = pointing.answers("nothing", 0.0)
    thoughts = [text[: text.rfind("</think>")] + "</think>\n\n" if "</think>" in text else text for text in unsteered]
    before = pointing.distributions("nothing", 0.0, thoughts)
    rows = [_row(pointing, "nothing", 0.0, unsteered, before, before)]
    conditions = [("pointed-at cell", value) for value in strengths]
    after = before
    controls = [(kind, best) for kind in ("another cell", "shuffled", "uniform", "mass not kept")]
    for kind, strength in [*conditions, *controls]:
        answers = pointing.answers(kind, strength)
        distribution = pointing.distributions(kind, strength, thoughts)
        rows.append(_row(pointing, kind, strength, answers, before, distribution))
        if (kind, strength) == ("pointed-at cell", best):
            steered, after = answers, distribution
    shown = tuple(
        Example(
            pointing.scenes[number], pointing.cells[number], pointing.questions[number],
            tuple(before[number, pointing.digit_ids].exp().tolist()), tuple(after[number, pointing.digit_ids].exp().tolist()),
            unsteered[number], steered[number],
        )
        for number in range(min(examples, scenes))
    )
    return PointingResult(tuple(rows), best, shown)


def _row(
    pointing: Pointing, kind: str, strength: float, answers: Sequence[str], before: Tensor, after: Tensor
) -> PointingRow:
    hits, total = _hits(pointing, answers), len(answers)
    readable = _count(answers, lambda number, digit: digit in pointing.scenes[number].labels)
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    low, high = wilson_interval(hits, total)
    return PointingRow(kind, strength, hits / total, low, high, readable / total, max(kl, 0.0), total)


def _hits(pointing: Pointing, answers: Sequence[str]) -> int:
    return _count(answers, lambda number, digit: digit == pointing.scenes[number].labels[pointing.cells[number]])


def _count(answers: Sequence[str], right: Callable[[int, int], bool]) -> int:
    """Answers that close their thought, name one digit, and are right; anything else is wrong."""
    digits = [(number, found) for number, text in enumerate(answers) if (found := ANSWER.search(text))]
    return sum(right(number, int(found.group(1))) for number, found in digits)
