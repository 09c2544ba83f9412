"""`hf-steer inspect`: where things are in a model."""

from __future__ import annotations

import argparse
import dataclasses
import json

from hf_steer.cli.command import Command

DESCRIPTION = """\
Print what structure finds in a model, and why: its decoder, the attention that can be steered, with its heads and how a bias comes
to it, what its other layers are, what is left out; its encoders, vision tower, projector and placeholder tokens, and whether it is
known where in a picture or sound they lie; whether it can be patched, and if not, the reason.

MODEL is a folder or a Hub repository; only config.json is read, never the weights.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub repository; its config.json is read")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub (default: its main branch)")
    parser.add_argument("--sites", action="store_true", help="list every attention that can be steered, one a line")


def run(arguments: argparse.Namespace) -> int:
    from hf_steer.analysis.inspection import inspect_model

    hub = {} if arguments.revision is None else {"revision": arguments.revision}
    report = inspect_model(arguments.model, **hub)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(report)
        if arguments.sites:
            print(report.listed())
    return 0 if report.can_be_patched else 1


INSPECT = Command("inspect", "where things are in a model", DESCRIPTION, add_arguments, run)
