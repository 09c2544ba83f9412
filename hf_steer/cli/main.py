"""The console script: finds the command, runs it, prints errors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from hf_steer import __version__
from hf_steer.cli.bench import BENCH
from hf_steer.cli.calibrate import CALIBRATE
from hf_steer.cli.demo import DEMO
from hf_steer.cli.heads import HEADS
from hf_steer.cli.inspect import INSPECT
from hf_steer.cli.saliency import SALIENCY
from hf_steer.cli.simulate import SIMULATE
from hf_steer.cli.sweep import SWEEP
from hf_steer.errors import SteerError

COMMANDS = (DEMO, INSPECT, SALIENCY, HEADS, SWEEP, CALIBRATE, SIMULATE, BENCH)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except SteerError as error:
        if arguments.json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        else:
            print(f"hf-steer: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """All commands with their arguments; `parse_args` gives a namespace whose `run` does what was asked."""
    parser = argparse.ArgumentParser(
        prog="hf-steer", description="Steer the attention of live Hugging Face models.", epilog="See also: hf-steer COMMAND --help"
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        own = commands.add_parser(
            command.name, formatter_class=argparse.RawDescriptionHelpFormatter, description=command.description, help=command.help
        )
        own.add_argument("--json", action="store_true", help="print one JSON object and nothing else on standard output")
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser
