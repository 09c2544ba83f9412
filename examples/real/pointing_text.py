"""Does pointing at a stretch of text decide the answer of a language model that nobody here trained? Writes the table.

    python examples/real/pointing_text.py --model ~/.cache/hf_steer/real/smollm2

`--split choose` answers the prompts on which defaults were chosen; the table is of `report`, which chose nothing. Conditions that
the CSV already holds are kept, so that a run can be stopped and gone on with; `--again` begins anew.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_steer
from hf_steer.evidence.text import SPLITS, make_cases
from hf_steer.evidence.text.conditions import conditions
from hf_steer.evidence.text.run import TextPointing, TextRow

FIGURES = Path(__file__).resolve().parent.parent / "figures"
TASKS = {"reports": (300, 0), "instruction": (300, 0), "fact, 600 words": (100, 600), "fact, 2600 words": (40, 2600)}
"""Task -> how many cases, and words of its text."""
LONG = (
    "unsteered", "default", "all heads, λ = 2", "found heads, λ = 2", "wrong span", "shuffled", "share 0.2",
    "prompt: told which", "prompt: said twice",
)  # fmt: skip
"""Conditions of long texts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model with a chat template")
    parser.add_argument("--heads", help="name or JSON file of heads that were found on other prompts; left out without")
    parser.add_argument("--split", choices=SPLITS, default="report")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", nargs="+", help="names of conditions; all without")
    parser.add_argument("--cases", type=int, help="cases of each task, instead of 300, 100 and 40")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FIGURES / "pointing_text.csv")
    parser.add_argument("--again", action="store_true", help="forget what the CSV holds")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    settings = model.config.get_text_config()
    shape = (settings.num_hidden_layers, settings.num_attention_heads)
    found = None if options.heads is None else hf_steer.load_heads(options.heads)
    table = conditions(shape, found, seed=options.seed)
    lines = [] if options.again or not options.out.exists() else _read(options.out)
    done = {(line["task"], line["condition"]) for line in lines}
    for task in options.tasks:
        count, words = TASKS[task]
        cases = make_cases(task.split(",")[0], options.split, options.cases or count, seed=options.seed, words=words)
        pointing = TextPointing(model, tokenizer)
        wanted = options.only or (LONG if words else table)
        for name in ("unsteered", *(name for name in wanted if name in table and name != "unsteered")):
            if name != "unsteered" and (task, name) in done:
                continue
            row = pointing.row(task, cases, table[name])  # unsteered ones always: the others are compared with them
            print(_said(row), flush=True)
            if (task, name) not in done:
                lines.append({**dataclasses.asdict(row), **_origin(options, model)})
                _write(options.out, lines)


def _said(row: TextRow) -> str:
    return (
        f"{row.task:<18} {row.condition:<34} right {row.right:.2f} [{row.low:.2f}, {row.high:.2f}]  wrong {row.wrong:.2f}  "
        f"readable {row.readable:.2f}  {row.nats:.2f} nats  KL {row.kl_nats:.3f}"
    )


def _origin(options: argparse.Namespace, model: torch.nn.Module) -> dict[str, object]:
    import transformers

    return {
        "split": options.split, "seed": options.seed, "model": Path(options.model).name, "dtype": options.dtype,
        "hf_steer": hf_steer.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def _read(path: Path) -> list[dict[str, object]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(path: Path, lines: list[dict[str, object]]) -> None:
    """Whole or not at all: a stopped run leaves what it had."""
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    part.replace(path)


if __name__ == "__main__":
    main()
