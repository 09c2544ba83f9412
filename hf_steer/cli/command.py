"""What one command is, and the kinds of arguments that several take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Command:
    """One row of `main.COMMANDS`.

    Attributes:
        name: as it is typed.
        help: one line for `hf-steer --help`.
        description: what `hf-steer NAME --help` teaches.
        add_arguments: declares the command's own arguments; `--json` is there already.
        run: does it; returns the exit status. Errors of hf_steer are printed by `main`.
    """

    name: str
    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def heads(text: str) -> dict[str, Any]:
    """`{"layer": [heads]}` as JSON, or a file that holds it."""
    try:
        source = Path(text).read_text(encoding="utf-8") if text.endswith(".json") else text
        found = json.loads(source)
    except (OSError, ValueError) as error:
        form = '{"3": [0, 5]}'
        raise argparse.ArgumentTypeError(f"must be JSON such as {form}, or a .json file; got {text!r} ({error})") from error
    found = found.get("heads", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"3": [0, 5]}}; got {text!r}')
    return found


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between them, such as 0,1,2; got {text!r}") from error
