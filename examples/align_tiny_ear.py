"""Which aligner lets a frozen mind hear best? SteerMoE's ablation in miniature, on spoken digit strings.

    python examples/align_tiny_ear.py                 # all of it: about 20 minutes on two cores
    python examples/align_tiny_ear.py --preset quick  # one expert count, one seed, a few steps: does it run?

`tiny_ear` (a Whisper encoder that never heard a digit) and `tiny_r1_text` (a Qwen3 that never heard anything) are joined by
`hf_steer.compose`. Both stay frozen. What is trained between them: a linear projection alone, or the projection and an aligner.
All get the same steps on the same utterances; strings and voices of the report were never trained on. Steps and learning rate
were chosen for the linear projection alone, on the validation split. Writes align.csv (one row per training), align_summary.csv
and align.png.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import spoken_digits as world
import torch
from tqdm.auto import tqdm
from train_tiny_ear import edit_distance, reply_to
from transformers.utils import logging

from hf_steer import AlignerConfig, compose

HERE = Path(__file__).parent
QUESTION = "which digits ?"
KINDS = {
    "simple": {"placement": "output", "kind": "simple"},
    "hierarchical": {"placement": "output", "kind": "hierarchical", "num_global_experts": 4},
    "progressive": {"placement": "output", "kind": "progressive", "num_stages": 3},
    "layer-wise": {"placement": "layers", "kind": "layer_wise"},
}
LINEAR = "linear alone"
BATCH, RATE = 16, 1e-2


@dataclass(frozen=True)
class Preset:
    """How much of the ablation to run."""

    experts: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    training: int
    held_out: int


PRESETS = {
    "full": Preset((1, 2, 4, 8, 16), (0, 1, 2), 200, 3200, 300),
    "quick": Preset((2,), (0,), 6, 32, 16),
}


@dataclass(frozen=True)
class Trial:
    """One training to run: an aligner (or none), its experts, and a seed."""

    aligner: str
    experts: int
    seed: int


@dataclass(frozen=True)
class Sounds:
    """Utterances as the model takes them: prompt and reply tokens, mel frames and which of them are real."""

    digits: tuple[str, ...]
    prompts: tuple[list[int], ...]
    replies: tuple[list[int], ...]
    features: torch.Tensor
    masks: torch.Tensor


def read_sounds(processor: Any, split: str, count: int, seed: int) -> Sounds:
    """Speak them and show them to the processor, the way a user would."""
    utterances = world.sample_utterances(split, count, seed)
    message = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": f" {QUESTION}"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    shown = [
        processor(text=text, audio=[utterance.audio], sampling_rate=world.SAMPLING_HZ, return_tensors="pt")
        for utterance in utterances
    ]
    return Sounds(
        digits=tuple(utterance.digits for utterance in utterances),
        prompts=tuple(one["input_ids"][0].tolist() for one in shown),
        replies=tuple(processor.tokenizer(reply_to(QUESTION, u.digits), add_special_tokens=False)["input_ids"] for u in utterances),
        features=torch.cat([one["input_features"] for one in shown]),
        masks=torch.cat([one["feature_attention_mask"] for one in shown]),
    )


def batch_of(sounds: Sounds, chosen: Sequence[int], pad: int, *, replies: bool) -> dict[str, torch.Tensor]:
    """Left-padded inputs; with replies also the labels."""
    rows = [sounds.prompts[index] + (sounds.replies[index] if replies else []) for index in chosen]
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "input_features": sounds.features[list(chosen)],
        "feature_attention_mask": sounds.masks[list(chosen)],
    }
    if replies:
        answers = [sounds.replies[index] for index in chosen]
        inputs["labels"] = torch.tensor([[-100] * (longest - len(answer)) + answer for answer in answers])
    return inputs


def bridge(trial: Trial | None) -> tuple[Any, Any]:
    """Ear and mind joined, frozen, with the trial's aligner between them."""
    aligner = None
    if trial is not None and trial.aligner != LINEAR:
        aligner = AlignerConfig(modality="audio", num_experts=trial.experts, **KINDS[trial.aligner])
    return compose(HERE / "tiny_ear", HERE / "tiny_r1_text", aligner=aligner)


def run(trial: Trial, preset: Preset, training: Sounds, held_out: Sounds) -> dict[str, Any]:
    """Train one bridge and read what it answers to the held-out sounds."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(trial.seed)
    model, processor = bridge(trial)
    pad = processor.tokenizer.pad_token_id
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=preset.steps, pct_start=0.1)
    random = np.random.default_rng(trial.seed)
    model.train()
    losses, started = [], time.perf_counter()
    for _ in range(preset.steps):
        chosen = random.integers(0, len(training.digits), BATCH).tolist()
        loss = model(**batch_of(training, chosen, pad, replies=True)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    seconds = time.perf_counter() - started
    wrong = errors_of(model.eval(), processor, held_out)
    return {
        **dataclasses.asdict(trial), "steps": preset.steps, "trainable_parameters": sum(p.numel() for p in parameters),
        "final_loss": round(float(np.mean(losses[-30:])), 4), "digits": sum(map(len, held_out.digits)), "errors": int(wrong.sum()),
        "seconds": round(seconds, 1), "wrong": wrong.tolist(),
    }  # fmt: skip


@torch.no_grad()
def errors_of(model: Any, processor: Any, sounds: Sounds) -> np.ndarray[Any, Any]:
    """Per utterance: digits inserted, deleted or substituted in the answer, under greedy decoding."""
    tokenizer, wrong = processor.tokenizer, []
    for start in range(0, len(sounds.digits), 50):
        chosen = range(start, min(start + 50, len(sounds.digits)))
        inputs = batch_of(sounds, chosen, tokenizer.pad_token_id, replies=False)
        said = model.generate(**inputs, max_new_tokens=14, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for index, row in zip(chosen, said, strict=True):
            _, _, answer = tokenizer.decode(row).partition("</think>")
            figures = [word for word in answer.split(tokenizer.eos_token)[0].split() if word.isdigit()]
            wrong.append(edit_distance(figures, list(sounds.digits[index])))
    return np.array(wrong)


def summarise(rows: list[dict[str, Any]], lengths: np.ndarray[Any, Any], *, draws: int = 2000) -> list[dict[str, Any]]:
    """Mean over seeds, with a 95 % interval from a bootstrap over seeds and utterances, and the paired difference from linear."""
    random = np.random.default_rng(0)
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["aligner"], row["experts"]), []).append(row)
    base = np.array([row["wrong"] for row in groups[LINEAR, 0]])
    summary = []
    for (aligner, experts), members in groups.items():
        wrong = np.array([row["wrong"] for row in members])
        rates, gaps = [], []
        for _ in range(draws):
            picked, seeds = random.integers(0, len(lengths), len(lengths)), random.integers(0, len(wrong), len(wrong))
            total = lengths[picked].sum() * len(seeds)
            rates.append(wrong[seeds][:, picked].sum() / total)
            gaps.append(rates[-1] - base[seeds][:, picked].sum() / total)
        low, high = np.quantile(rates, (0.025, 0.975))
        gap_low, gap_high = np.quantile(gaps, (0.025, 0.975))
        summary.append(
            {
                "aligner": aligner, "experts": experts, "seeds": len(members),
                "trainable_parameters": members[0]["trainable_parameters"],
                "error_rate": wrong.sum() / lengths.sum() / len(members), "low": low, "high": high,
                "less_linear": (wrong.sum() - base.sum()) / lengths.sum() / len(members), "less_linear_low": gap_low,
                "less_linear_high": gap_high, "final_loss": np.mean([row["final_loss"] for row in members]),
                "seconds": np.mean([row["seconds"] for row in members]),
            }
        )  # fmt: skip
    return summary


def draw(summary: list[dict[str, Any]], path: Path) -> None:
    """Error rate against experts; the band is the linear projection alone."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    linear = next(row for row in summary if row["aligner"] == LINEAR)
    axes.axhspan(100 * linear["low"], 100 * linear["high"], color="0.9")
    axes.axhline(100 * linear["error_rate"], color="0.4", linewidth=1, label=LINEAR)
    for shift, kind in zip((-0.09, -0.03, 0.03, 0.09), KINDS, strict=True):
        rows = [row for row in summary if row["aligner"] == kind]
        middle = np.array([100 * row["error_rate"] for row in rows])
        reach = np.abs(np.array([[100 * row["low"] for row in rows], [100 * row["high"] for row in rows]]) - middle)
        places = np.log2([row["experts"] for row in rows]) + shift
        axes.errorbar(places, middle, yerr=reach, marker="o", markersize=4, capsize=2, linewidth=1, label=f"linear + {kind}")
    experts = sorted({row["experts"] for row in summary if row["experts"]})
    axes.set(xlabel="experts", ylabel="digit error rate, held-out voices and strings (%)", xticks=np.log2(experts))
    axes.set_xticklabels(experts)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "wrong"], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--split", choices=("held-out", "validation"), default="held-out", help="what to report on")
    parser.add_argument("--only", choices=(LINEAR, *KINDS), help="one aligner, for choosing settings")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, one core each")
    parser.add_argument("--output", type=Path, default=HERE / "figures")
    given = parser.parse_args()
    preset = PRESETS[given.preset]
    preset = preset if given.steps is None else dataclasses.replace(preset, steps=given.steps)
    started = time.perf_counter()
    logging.disable_progress_bar()
    _, processor = bridge(None)
    training = read_sounds(processor, "training", preset.training, seed=100)
    held_out = read_sounds(processor, given.split, preset.held_out, seed=101)
    trials = [Trial(LINEAR, 0, seed) for seed in preset.seeds]
    trials += [Trial(kind, experts, seed) for kind in KINDS for experts in preset.experts for seed in preset.seeds]
    trials = [trial for trial in trials if given.only in (None, trial.aligner)]
    with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, trial, preset, training, held_out) for trial in trials]
        rows = [future.result() for future in tqdm(futures, desc="trainings")]
    given.output.mkdir(parents=True, exist_ok=True)
    write_csv(given.output / "align.csv", rows)
    if given.only in (None, LINEAR):
        summary = summarise(rows, np.array([len(digits) for digits in held_out.digits]))
        write_csv(given.output / "align_summary.csv", summary)
        for row in summary:
            print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}))
        if given.only is None:
            draw(summary, given.output / "align.png")
    print(f"{len(rows)} trainings in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
