"""Listen here: three phrases in one sound, one of them pointed at in seconds on Whisper's cross-attention; what does it write?

    python examples/real/fetch.py whisper-base phrases
    python examples/real/listen.py --output examples/figures          # an hour on two cores
    python examples/real/listen.py --quick --output SOMEWHERE         # a few sounds

A third of the phrases chooses heads, strength, normalisation and what is pointed at; two thirds are reported on, and no text is in
both. What was heard is kept on disk, so a run that was broken off goes on.
"""

import argparse
import csv
import datetime
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from fetch import default_folder
from listening import STATEMENTS, Ear, make_sounds, pointing, score, shuffled, split_phrases, uniform
from recordings import read_recordings

import hf_steer
from hf_steer import AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.analysis.provenance import Provenance, content_hash
from hf_steer.config.manners import MANNERS
from hf_steer.evidence.pointing import wilson_interval

DRAWS = 2000
SEED = 0
BEAMS = 4


@dataclass(frozen=True)
class Preset:
    """How much is run.

    Attributes:
        choosing: sounds that choose.
        report: sounds that are reported on.
        beams: of them, with beams.
        strengths: the grid of λ, normalize="none".
        random: sets of random heads.
    """

    choosing: int
    report: int
    beams: int
    strengths: tuple[float, ...]
    random: int


PRESETS = {
    "full": Preset(16, 102, 12, (1.0, 2.0, 3.0, 4.0, 6.0), 2),
    "quick": Preset(3, 3, 2, (2.0, 4.0), 1),
}
HEADS_KEPT = 10


@dataclass(frozen=True)
class Setting:
    """One way of steering.

    Attributes:
        heads: a name.
        strength: λ.
        normalize: of the saliency.
        statement: of `listening.STATEMENTS`.
    """

    heads: str
    strength: float
    normalize: str
    statement: str


def attention_of(setting, head_sets):
    return AttentionConfig(
        attends="cross", heads=head_sets[setting.heads], strength=setting.strength,
        saliency=SaliencyConfig(source=None, normalize=setting.normalize),
    )  # fmt: skip


def by_layer(pairs):
    layers = sorted({layer for layer, _ in pairs})
    return {layer: tuple(sorted(head for other, head in pairs if other == layer)) for layer in layers}


def sets_of_heads(ear, sounds, sets):
    """All heads, those found by attention, those that Whisper's authors align words with, and as many random ones as were found."""
    looks = ear.aligned_heads(sounds)
    layers, heads = looks.shape
    every = [(layer, head) for layer in range(layers) for head in range(heads)]
    found = sorted(every, key=lambda pair: -looks[pair])[:HEADS_KEPT]
    random = np.random.default_rng(SEED)
    drawn = {f"random {number}": by_layer([every[place] for place in random.choice(len(every), HEADS_KEPT, replace=False)])
             for number in range(sets)}  # fmt: skip
    published = by_layer([tuple(pair) for pair in ear.model.generation_config.alignment_heads])
    return {"all": "all", "found": by_layer(found), "published": published, **drawn}


class Table:
    """Rows of the report, each with its intervals and where it comes from."""

    def __init__(self, ear, head_sets, path):
        self.ear, self.head_sets, self.path, self.rows, self.plain = ear, head_sets, path, [], {}
        self.date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

    def add(self, split, task, sounds, said, setting=None, saying=None, **generation):
        """Hears the sounds under one condition and notes what came of it; the first of a task is what others are held against."""
        attention = None if setting is None else attention_of(setting, self.head_sets)
        name = f"{said} {setting.heads} {setting.strength:g}" if setting else said
        texts = self.ear.hear(sounds, name, attention, saying, **generation)
        if texts is None:
            print(f"not heard yet: {split} {task} {name}", flush=True)
            return {"f1": 0.0}
        row = self.measured(split, task, sounds, texts, said, setting)
        row |= asdict(self.origin(sounds, attention, generation))
        self.rows.append(row)
        self.write()
        figures = " ".join(f"{name} {row[name] or 0:.2f}" for name in ("right", "recall", "share", "f1", "wer"))
        print(f"{split:9} {task:6} {said:14} {row['heads']:10} λ={row['strength']:<4} {row['normalize']:7} {row['statement']:18} "
              f"{figures}", flush=True)  # fmt: skip
        return row

    def measured(self, split, task, sounds, texts, said, setting):
        scores = [score(sound, text) for sound, text in zip(sounds, texts, strict=True)]
        column = {name: np.array([one[name] for one in scores], float) for name in scores[0]}
        draws = np.random.default_rng(SEED).integers(len(sounds), size=(DRAWS, len(sounds)))
        row = {"split": split, "task": task, "said": said, "heads": setting.heads if setting else "none",
               "strength": setting.strength if setting else 0.0, "normalize": setting.normalize if setting else "none",
               "statement": setting.statement if setting else "nothing", "sounds": len(sounds)}  # fmt: skip
        row |= {"right": "", "right_low": "", "right_high": ""}
        if task != "alone":  # there is no other phrase to be nearer to
            row["right"] = column["right"].mean()
            row["right_low"], row["right_high"] = wilson_interval(int(column["right"].sum()), len(sounds))
        for name in ("recall", "share", "f1"):
            row[name] = column[name].mean()
            row[f"{name}_low"], row[f"{name}_high"] = np.percentile(column[name][draws].mean(1), (2.5, 97.5))
        row["wer"] = column["edits"].sum() / column["words"].sum()
        rates = column["edits"][draws].sum(1) / column["words"][draws].sum(1)
        row["wer_low"], row["wer_high"] = np.percentile(rates, (2.5, 97.5))
        plain = self.plain.setdefault((split, task, len(sounds)), column)
        row["wer_more"] = row["wer"] - plain["edits"].sum() / plain["words"].sum()
        more = rates - plain["edits"][draws].sum(1) / plain["words"][draws].sum(1)
        row["wer_more_low"], row["wer_more_high"] = np.percentile(more, (2.5, 97.5))
        return row

    def origin(self, sounds, attention, generation):
        about = [[phrase.path.name for phrase in sound.phrases] + [sound.pointed] for sound in sounds]
        return Provenance(
            date=self.date, hf_steer=hf_steer.__version__, torch=torch.__version__, transformers=transformers.__version__,
            model=self.ear.folder.name, model_type=self.ear.model.config.model_type,
            config_hash="" if attention is None else content_hash(SteerConfig(attention=attention).to_json()),
            inputs_hash=content_hash([about, generation, str(self.ear.model.dtype)]), seed=SEED,
        )  # fmt: skip

    def write(self):
        """After every row, so that what is known is there to be read."""
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: f"{value:.4f}" if isinstance(value, float) and name != "strength" else value
                              for name, value in row.items()} for row in self.rows)  # fmt: skip


def choose(table, sounds, preset):
    """The best settings by F1 of the words, per kind of heads, and with z-scores: first what is said, then heads and strength."""

    @lru_cache
    def tried(setting):
        return table.add("choosing", "three", sounds, "pointed-at", setting, pointing(setting.statement))["f1"]

    def best(settings):
        return max(settings, key=tried)

    table.add("choosing", "three", sounds, "nothing")
    first = best([Setting("all", 4.0, "none", statement) for statement in STATEMENTS])
    strengths = [strength for strength in preset.strengths if strength >= 2]
    chosen = {heads: best([Setting(heads, strength, "none", first.statement) for strength in strengths])
              for heads in ("all", "found")}  # fmt: skip
    chosen["published"] = Setting("published", chosen["found"].strength, "none", first.statement)
    chosen["zscore"] = best([Setting("all", strength, "zscore", first.statement) for strength in (0.5, 1.0, 2.0)])
    chosen["best"] = max(chosen.values(), key=tried)
    return chosen


def report(table, sounds, preset, chosen):
    """All conditions on sounds of phrases that chose nothing."""
    best = chosen["best"]

    def three(said, setting=None, saying=None):
        table.add("report", "three", sounds, said, setting, saying)

    done = {best}

    def pointed(settings):
        for setting in dict.fromkeys(settings):
            if setting not in done:
                done.add(setting)
                three("pointed-at", setting, pointing(setting.statement))

    three("nothing")
    three("pointed-at", best, pointing(best.statement))
    three("another phrase", best, pointing(best.statement, shift=1))
    three("shuffled", best, shuffled(best.statement))
    alone = [sound.alone() for sound in sounds]
    table.add("report", "alone", alone, "nothing")
    default = Setting("all", MANNERS["sound"].strength, "auto", "phrase")
    others = [default, *(chosen[name] for name in ("all", "found", "zscore"))]
    others += [Setting(f"random {number}", best.strength, best.normalize, best.statement) for number in range(preset.random)]
    pointed(others)
    for setting in (default, best):
        table.add("report", "alone", alone, "pointed-at", setting, pointing(setting.statement))
    few = sounds[: preset.beams]
    table.add("report", "beams", few, "nothing", num_beams=BEAMS)
    table.add("report", "beams", few, "pointed-at", best, pointing(best.statement), num_beams=BEAMS)
    three("uniform", best, uniform)
    pointed([chosen["published"], *(Setting("all", chosen["all"].strength, "none", statement) for statement in STATEMENTS)])
    if best.normalize == "none":
        pointed(Setting(best.heads, strength, "none", best.statement) for strength in preset.strengths)


def as_markdown(rows):
    """The report's rows as a table for a page; rows may come from the file, as words."""
    names = ("sound", "said", "heads", "λ", "normalize", "pointed at", "sounds", "right", "recall", "share", "word errors", "more")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        if row["split"] == "report":
            cells = [row[name] for name in ("task", "said", "heads")] + [f"{float(row['strength']):g}", row["normalize"]]
            cells += [row["statement"], str(row["sounds"])]
            cells += [between(row, name) for name in ("right", "recall", "share", "wer", "wer_more")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def between(row, name):
    if row[name] == "":
        return ""
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=default_folder() / "whisper-base", help="folder of a Whisper; %(default)s")
    parser.add_argument("--phrases", type=Path, default=default_folder() / "phrases", help="folder of recordings; %(default)s")
    parser.add_argument("--cache", type=Path, default=default_folder() / "listen", help="what the ear heard; %(default)s")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for listen.csv and listen.png")
    parser.add_argument("--quick", action="store_true", help="a few sounds: shows that it runs, and no more")
    parser.add_argument("--batch", type=int, default=16, help="sounds at once")
    parser.add_argument("--known", action="store_true", help="hear nothing new: a table of what an earlier run heard")
    args = parser.parse_args(arguments)
    preset = PRESETS["quick" if args.quick else "full"]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ear = Ear(args.model, args.cache, batch=args.batch, only_known=args.known)
    for_choosing, for_report = split_phrases(read_recordings(args.phrases), seed=SEED)
    print(f"{len(for_choosing)} phrases choose, {len(for_report)} are reported on", flush=True)
    choosing = make_sounds(for_choosing, preset.choosing, seed=SEED)
    args.output.mkdir(parents=True, exist_ok=True)
    table = Table(ear, sets_of_heads(ear, choosing, preset.random), args.output / "listen.csv")
    print("heads:", table.head_sets, flush=True)
    chosen = choose(table, choosing, preset)
    print("chosen:", chosen, flush=True)
    report(table, make_sounds(for_report, preset.report, seed=SEED + 1), preset, chosen)
    from plots import plot_listening

    plot_listening(table.rows, args.output / "listen.png")
    print(as_markdown(table.rows))
    print(f"written: {args.output / 'listen.csv'}, {args.output / 'listen.png'}")


if __name__ == "__main__":
    main()
