"""`hf-steer inspect`: where things are in a model."""

from __future__ import annotations

import argparse
import dataclasses
import json

from hf_steer.cli.command import Command

DESCRIPTION = """\
Print where a model's vision tower, decoder layers, heads and placeholder tokens are, and whether it can be patched.
MODEL is a folder or a Hub repository; only config.json is read, never the weights.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub repository; its config.json is read")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub (default: its main branch)")


def run(arguments: argparse.Namespace) -> int:
    from hf_steer.analysis.inspection import inspect_model

    hub = {} if arguments.revision is None else {"revision": arguments.revision}
    report = inspect_model(arguments.model, **hub)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(report)
    return 0 if report.can_be_patched else 1


INSPECT = Command("inspect", "where things are in a model", DESCRIPTION, add_arguments, run)
