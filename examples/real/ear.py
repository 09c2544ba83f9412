"""A real ear: Whisper's encoder and SmolLM2, both frozen, and an aligner between them, trained to write what real recordings say.

    python examples/real/fetch.py smollm2 whisper-base phrases readers
    python examples/real/ear.py --output examples/figures      # all of it
    python examples/real/ear.py --preset quick                 # tiny stand-ins, nothing downloaded: does it run?

`hf_steer.compose` joins the two. What is trained between: a linear projection alone, or one and an aligner on the encoder's
states, with the same start, sounds, order and number of steps. The phrases are of one speaker, and are divided by what is said:
those of the report were never trained on (their words mostly were, and some phrases begin or end alike). Ten sentences of other
readers are only reported on. The encoder hears its whole window of 30 seconds, positions counted from its beginning; the states
that lie on the sound are kept on disk and are all that the decoder gets, four of them a token. The projection starts as least
squares from states to the embeddings of the tokens that are spoken there. Its ridge, the prompt and the learning rate were chosen
for the linear projection alone on phrases of a third split; by these, too, every training is stopped where it was least wrong. Two
figures: the word error rate of what is written (1 is what an empty page has; more is possible), and how often the right transcript
is the likeliest of eight that are about as long. Every training is kept in the cache, so that a run that was stopped goes on.
Writes ear.csv and ear.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ear_standins
import numpy as np
import torch
from ear_sounds import Sound, divide, hear
from ear_training import SETTINGS, Writer, chosen_among, join, start_projector, train, transcribe
from fetch import default_folder
from kept import kept, write_csv
from mind_training import KINDS, LINEAR
from recordings import Recording, read_recordings
from tqdm.auto import tqdm
from transformers.utils import logging
from words import edits_between, normal_words

from hf_steer.analysis.provenance import content_hash

CANDIDATES = 8
SETS = {"report": "held-out phrases", "readers": "other readers"}
PIECES = {"ear": "whisper-base", "mind": "smollm2", "phrases": "phrases", "readers": "readers"}
START, WHISPER, ANOTHER = "start, untrained", "Whisper's own decoder", "linear alone, sound of another phrase"


@dataclass(frozen=True)
class Preset:
    """How much to run.

    Attributes:
        report: phrases that are reported on.
        choosing: phrases that settings were chosen by.
        steps: of every training.
        looks: at the choosing phrases in every training; where it was least wrong about them is what is reported on.
        seeds: trainings of each kind.
    """

    report: int
    choosing: int
    steps: int
    looks: int
    seeds: int


PRESETS = {"full": Preset(64, 24, 320, 8, 3), "quick": Preset(10, 4, 3, 2, 1)}


@dataclass(frozen=True)
class Bench:
    """Where everything lies.

    Attributes:
        preset: how much.
        cache: folder for what is kept.
        places: folders of ear, mind, phrases and readers.
        folder: for the steps of this run.
    """

    preset: Preset
    cache: Path
    places: Mapping[str, Path]
    folder: Path

    def recordings(self) -> dict[str, list[Recording]]:
        """By split."""
        phrases = read_recordings(self.places["phrases"])
        parts = divide(phrases, report=self.preset.report, choosing=self.preset.choosing)
        return {**parts, "readers": read_recordings(self.places["readers"])}

    def sounds(self) -> dict[str, list[Sound]]:
        return {name: hear(self.places["ear"], own, self.cache) for name, own in self.recordings().items()}


def make_bench(preset: Preset, cache: Path, pieces: Path | None) -> Bench:
    """With the pieces that `fetch.py` made, or, where there is no folder of them, with stand-ins."""
    own = {name: pieces / folder for name, folder in PIECES.items()} if pieces else None
    places = own or ear_standins.write_standins(cache / "tiny-ear")
    about = [[(one.path.name, one.text) for one in read_recordings(places[name])] for name in ("phrases", "readers")]
    folder = cache / f"ear-{content_hash([about, dataclasses.astuple(preset), KINDS, SETTINGS])}"
    folder.mkdir(parents=True, exist_ok=True)
    return Bench(preset, cache, places, folder)


def candidates_of(sounds: Sequence[Sound]) -> list[list[str]]:
    """For each sound its own transcript, and those of seven others that are nearest to it in length."""

    def apart(one: int, other: int) -> tuple[int, int]:
        return abs(len(sounds[one].text.split()) - len(sounds[other].text.split())), abs(one - other)

    rows = []
    for place, own in enumerate(sounds):
        others = [other for other in range(len(sounds)) if other != place and sounds[other].text != own.text]
        others = sorted(others, key=lambda other: apart(place, other))[: CANDIDATES - 1]
        rows.append([own.text, *(sounds[other].text for other in others)])
    return rows


def measured(writer: Writer, sounds: Mapping[str, Sequence[Sound]]) -> dict[str, Any]:
    """What is written of the sounds of both reports, and whether the right transcript was the likeliest."""
    found: dict[str, Any] = {}
    for name in SETS:
        own = sounds[name]
        found[name] = {"written": transcribe(writer, own), "right": right_of(writer, own, own)}
    return found


def right_of(writer: Writer, sounds: Sequence[Sound], told: Sequence[Sound]) -> list[bool]:
    """Whether the first candidate, the right one, is the likeliest, where the model is told each of these sounds."""
    return [choice == 0 for choice in chosen_among(writer, told, candidates_of(sounds))]


def start_of(bench: Bench, kind: str, seed: int) -> tuple[Writer, dict[str, list[Sound]]]:
    """A model whose projection stands where it starts, and the sounds."""
    sounds = bench.sounds()
    torch.manual_seed(seed)
    writer = Writer(*join(bench.places["ear"], bench.places["mind"], kind))
    start_projector(writer, sounds["training"])
    return writer, sounds


def run(bench: Bench, kind: str, seed: int) -> dict[str, Any]:
    """Train what is between the two, and let it write."""
    writer, sounds = start_of(bench, kind, seed)
    trained = [parameter for parameter in writer.model.parameters() if parameter.requires_grad]
    preset = bench.preset
    losses, seen = train(writer, sounds["training"], sounds["choosing"], steps=preset.steps, seed=seed, looks=preset.looks)
    writer.round()
    found = {
        "loss": float(np.mean(losses[-20:])), "choosing_loss": min(seen), "seen": seen, "losses": losses,
        "kept_step": preset.steps * (1 + int(np.argmin(seen))) // preset.looks,
        "parameters": sum(map(torch.Tensor.numel, trained)), **measured(writer, sounds),
    }  # fmt: skip
    if kind == LINEAR:
        for name in SETS:
            found[name]["right of another"] = right_of(writer, sounds[name], shifted(sounds[name]))
    return found


def shifted(values: Sequence[Any]) -> list[Any]:
    """Everyone gets that of the one half the list away."""
    half = len(values) // 2
    return [*values[half:], *values[:half]]


def untrained(bench: Bench) -> dict[str, Any]:
    writer, sounds = start_of(bench, LINEAR, 0)
    writer.round()
    return measured(writer, sounds)


def whisper(bench: Bench) -> dict[str, Any]:
    """What Whisper's own decoder writes."""
    import listening

    heard = listening.Ear(bench.places["ear"], bench.cache / "ear-whisper")
    recordings = bench.recordings()
    return {name: {"written": heard.hear([listening.Sound((one,), 0) for one in recordings[name]], WHISPER)} for name in SETS}


def work(bench: Bench, kind: str, seed: int) -> tuple[str, int]:
    """One training."""
    kept(bench.folder, name_of(kind, seed), lambda: run(bench, kind, seed))
    return kind, seed


def quietly() -> None:
    """In every process: one core, and no bars but ours."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def name_of(kind: str, seed: int) -> str:
    return f"{kind.split()[0]}-{seed}"


def trials_of(bench: Bench, workers: int) -> dict[tuple[str, int], dict[str, Any]]:
    """All trainings by kind and seed, so many at a time."""
    wanted = [(kind, seed) for seed in range(bench.preset.seeds) for kind in KINDS]
    missing = [one for one in wanted if not (bench.folder / f"{name_of(*one)}.json").is_file()]
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc="trainings") as bar:
        if workers > 1 and missing:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), quietly) as pool:
                for future in [pool.submit(work, bench, *one) for one in missing]:
                    future.result()
                    bar.update()
        else:
            for one in missing:
                work(bench, *one)
                bar.update()
    return {(kind, seed): kept(bench.folder, name_of(kind, seed), lambda: None) for kind, seed in wanted}


class Figures:
    """Word error rates and right choices of groups of runs on one set of sounds, with intervals.

    Intervals are percentiles of a bootstrap over seeds and sounds; differences are paired by both.

    Args:
        texts: what is said, in the order of the sounds.
        draws: of the bootstrap.
    """

    def __init__(self, texts: Sequence[str], draws: int = 2000) -> None:
        self.due = [normal_words(text) for text in texts]
        self.lengths = np.array([len(words) for words in self.due], dtype=float)
        self.draws = np.random.default_rng(0).integers(len(texts), size=(draws, len(texts)))

    def edits(self, written: Sequence[str]) -> list[int]:
        return [edits_between(due, normal_words(text)) for due, text in zip(self.due, written, strict=True)]

    def row(self, edits: Any, right: Any = None, base: Any = None) -> dict[str, Any]:
        """Columns of a table.

        Args:
            edits: `(seeds, sounds)`.
            right: `(seeds, sounds)`; None where nothing was chosen.
            base: edits and right of what this is held against.
        """
        edits = np.array(edits, dtype=float)
        row = {"n": edits.shape[1], "seeds": len(edits), **self._with_interval("wer", edits, self.lengths)}
        if right is not None:
            right, ones = np.array(right, dtype=float), np.ones_like(self.lengths)
            row |= self._with_interval("right", right, ones)
        if base is not None:
            row |= self._with_interval("wer_less_linear", edits - np.array(base[0], dtype=float), self.lengths)
            row |= self._with_interval("right_less_linear", right - np.array(base[1], dtype=float), ones)
        return row

    def _with_interval(self, name: str, values: Any, weights: Any) -> dict[str, float]:
        seeds = np.random.default_rng(1).integers(len(values), size=(len(self.draws), len(values)))
        drawn = [
            values[own][:, place].sum() / weights[place].sum() / len(own) for own, place in zip(seeds, self.draws, strict=True)
        ]
        low, high = np.quantile(drawn, (0.025, 0.975))
        return {name: values.sum() / weights.sum() / len(values), f"{name}_low": float(low), f"{name}_high": float(high)}


def table(bench: Bench, trials: Mapping[tuple[str, int], dict[str, Any]], sounds: Mapping[str, Sequence[Sound]],
          others: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of both reports: every kind, and what it is held against."""
    for name, title in SETS.items():
        figures = Figures([one.text for one in sounds[name]])
        groups = {kind: [trial for (own, _), trial in trials.items() if own == kind] for kind in KINDS}
        edits = {kind: [figures.edits(one["value"][name]["written"]) for one in own] for kind, own in groups.items()}
        right = {kind: [one["value"][name]["right"] for one in own] for kind, own in groups.items()}
        for kind, own in groups.items():
            means = {
                column: float(np.mean([one["value"][column] for one in own])) for column in ("loss", "choosing_loss", "kept_step")
            } | {column: float(np.mean([one[column] for one in own])) for column in ("seconds", "cpu_seconds")}  # fmt: skip
            base = None if kind == LINEAR else (edits[LINEAR], right[LINEAR])
            yield {
                "sounds": title, "condition": kind, "parameters": own[0]["value"]["parameters"],
                **figures.row(edits[kind], right[kind], base), **means,
            }  # fmt: skip
        for condition, value in others.items():
            wrong, hits = figures.edits(value[name]["written"]), value[name].get("right")
            yield {"sounds": title, "condition": condition, **figures.row([wrong], None if hits is None else [hits])}
        linear = [one["value"][name] for one in groups[LINEAR]]
        strange = [figures.edits(shifted(one["written"])) for one in linear]
        yield {"sounds": title, "condition": ANOTHER, **figures.row(strange, [one["right of another"] for one in linear])}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--pieces", type=Path, default=default_folder(), help="folder that fetch.py filled; %(default)s")
    parser.add_argument("--cache", type=Path, default=default_folder() / "ear", help="what is kept; %(default)s")
    parser.add_argument("--seeds", type=int, help="trainings of each kind, instead of the preset's; more may be added later")
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, one core each")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for ear.csv and ear.png")
    given = parser.parse_args(arguments)
    quietly()
    started, real = time.perf_counter(), given.preset == "full"
    bench = make_bench(PRESETS[given.preset], given.cache, given.pieces if real else None)
    if given.seeds is not None:
        bench = dataclasses.replace(bench, preset=dataclasses.replace(bench.preset, seeds=given.seeds))
    sounds = bench.sounds()
    print({name: len(own) for name, own in sounds.items()}, flush=True)
    trials = trials_of(bench, given.workers)
    others = {START: kept(bench.folder, "start", lambda: untrained(bench))["value"]}
    if real:
        others[WHISPER] = kept(bench.folder, "whisper", lambda: whisper(bench))["value"]
    rows = list(table(bench, trials, sounds, others))
    given.output.mkdir(parents=True, exist_ok=True)
    write_csv(given.output / "ear.csv", rows, bench.folder.name)
    from plots import plot_ears

    plot_ears(rows, given.output / "ear.png")
    for row in rows:
        print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}))
    print(f"{len(trials)} trainings in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
