"""Which architectures of the installed transformers hf_steer can steer: tiny random models, each held against a float oracle.

    python examples/coverage.py --csv coverage.csv --markdown
    python examples/coverage.py --only llama qwen3_5 --json
    python examples/coverage.py --shard 1/2 --csv first_half.csv
"""

import argparse
import csv
import json
import os
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers

from hf_steer.testing.coverage import STAGES, cover
from hf_steer.testing.zoo import architectures

MARKS = {True: "yes", False: "no", None: ""}


def chosen(only, shard):
    """The architectures asked for: of these model types or classes, and of these every n-th."""
    place, shards = map(int, shard.split("/"))
    if not 1 <= place <= shards:
        raise SystemExit(f"--shard {shard}: write i/n with i from 1 to n")
    names = [one for one in architectures() if not only or {one.model_type, one.class_name, str(one)} & set(only)]
    if not names:
        raise SystemExit(f"transformers {transformers.__version__} has no architecture called {' or '.join(only)}")
    return names[place - 1 :: shards]


def covered(names, implementation):
    for number, one in enumerate(names, 1):
        found = cover(one.model_type, one.class_name, implementation=implementation)
        state = "ok" if found.covered else ", ".join(found.failed) or found.reason[:90]
        print(f"[{number}/{len(names)}] {one} {found.seconds:.1f} s {state}", file=sys.stderr, flush=True)
        yield found


def as_table(found):
    """Counts by kind: those that run, call the interface, are patched, and of these each stage's held / shown."""
    lines = ["| kind | run | call the interface | patched | " + " | ".join(STAGES) + " |", "|---|" + "---|" * (3 + len(STAGES))]
    kinds = list(dict.fromkeys(one.kind for one in found))
    for kind, rows in [*((kind, [one for one in found if one.kind == kind]) for kind in kinds), ("all", found)]:
        cells = [f"{sum(one.builds for one in rows)} of {len(rows)}"]
        cells += [str(sum(getattr(one, name) for one in rows)) for name in ("interface", "patched")]
        for stage in STAGES:
            shown = [one.stages[stage] for one in rows if one.stages[stage] is not None]
            cells.append(f"{sum(shown)} of {len(shown)}")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_word(value):
    return MARKS[value] if value is None or isinstance(value, bool) else value


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: as_word(value) for name, value in row.items()} for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="model types or classes")
    parser.add_argument("--shard", default="1/1", metavar="i/n", help="every n-th architecture, from the i-th")
    parser.add_argument("--implementation", default="eager", help="of attention in the steered model; the oracle is eager")
    parser.add_argument("--csv", metavar="PATH", help="a line per architecture")
    parser.add_argument("--json", action="store_true", help="print all as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the counts by kind as a table")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = list(covered(chosen(args.only, args.shard), args.implementation))
    rows = [one.row() for one in found]
    if args.csv:
        write_csv(args.csv, rows)
    if args.json:
        print(json.dumps({"transformers": transformers.__version__, "architectures": rows}, indent=1))
    if args.markdown:
        print(as_table(found))
    if not (args.json or args.markdown):
        held = [one for one in found if one.interface]
        print(f"{sum(one.covered for one in held)} of {len(held)} that call the attention interface are covered; and "
              f"{sum(one.covered for one in found if not one.interface)} others")


if __name__ == "__main__":
    main()
