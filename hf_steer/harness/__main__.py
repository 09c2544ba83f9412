"""`lm_eval`, with the model type `hf-steer` and its tasks; every argument is theirs. `compare` is ours: steered beside plain."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_steer.errors import FileError
from hf_steer.harness.compare import TASKS, compare, write_scores

COMMANDS = ("run", "ls", "validate")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the harness's own command line, or `compare`.

    Raises:
        FileError: the harness is not installed.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        from lm_eval.__main__ import cli_evaluate

        from hf_steer.harness.model import SteeredLM  # which registers itself
    except ImportError as error:
        raise FileError(f"lm-evaluation-harness is not installed ({error}): pip install 'hf-steer[harness]'.") from error
    if given[:1] == ["compare"]:
        own = _parser().parse_args(given[1:])
        lm = SteeredLM(own.model, own.steering, gguf_file=own.gguf_file, dtype=own.dtype, batch_size=own.batch_size)
        scores = compare(lm, limit=own.limit)
        print(f"{'task':<20}{'':<10}{'accuracy':>9}{'stderr':>9}{'documents':>11}")  # noqa: T201
        for score in scores:
            how = "steered" if score.steered else "plain"
            print(f"{score.task:<20}{how:<10}{score.accuracy:>9.3f}{score.stderr:>9.3f}{score.documents:>11}")  # noqa: T201
        print(f"Table: {write_scores(scores, own.output)}")  # noqa: T201
        return
    run = given if given[:1] and given[0] in COMMANDS else ["run", *given]
    sys.argv = ["lm_eval", *run, *([] if "--include_path" in run else ["--include_path", str(TASKS)])]
    cli_evaluate()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hf_steer.harness compare", description="Our two tasks, steered and plain.")
    parser.add_argument("--model", required=True, metavar="MODEL", help="folder or Hub repository")
    parser.add_argument("--steering", metavar="DIR", help="folder of a saved steering (default: what lies beside the model)")
    parser.add_argument("--gguf-file", metavar="FILE", help="of the model, in its folder (default: none)")
    parser.add_argument("--dtype", default="auto", metavar="DTYPE", help="of the weights (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="requests at once (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    parser.add_argument("--output", type=Path, default=Path("hf_steer_harness"), metavar="DIR", help="for the table")
    return parser


if __name__ == "__main__":
    main()
