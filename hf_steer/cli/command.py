"""What one command is, and the options that several have: one name, one kind and one way to explain each."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_steer.cli.kinds import Kind, Several, positive, whole
from hf_steer.errors import FileError


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


def add_option(parser: argparse.ArgumentParser, name: str, *, former: str | None = None, **settings: Any) -> None:
    """An option, and the name that it once had, which still works and which `--help` does not show."""
    parser.add_argument(name, **settings)
    if former is not None:
        settings |= {"dest": name.lstrip("-").replace("-", "_"), "help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        if settings.get("action") is Several:
            settings["nargs"] = "+"  # once there were spaces between them
        parser.add_argument(former, **settings)


def add_list(
    parser: argparse.ArgumentParser, name: str, kind: Kind, metavar: str, help: str, *, former: str | None = None
) -> None:
    """An option that takes several values, with commas between them; None when it is left out."""
    add_option(parser, name, former=former, action=Several, kind=kind, metavar=f"{metavar},...", help=help)


def listed(values: Sequence[float]) -> str:
    """As they are typed."""
    return ",".join(f"{value:g}" for value in values)


def add_model(parser: argparse.ArgumentParser, help: str = "folder or Hub repository (default: the embedded model)") -> None:
    parser.add_argument("--model", metavar="MODEL", help=help)


def add_prompt(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    said = default or "none, and --image needs one"
    parser.add_argument("--prompt", metavar="TEXT", default=default, help=f"the question about each picture (default: {said})")


def add_heads(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--heads", metavar="HEADS", default="all",
        help=f'{what}: JSON such as \'{{"1": [0, 3]}}\', a file with it, or a list by name (default: %(default)s)',
    )  # fmt: skip


EXAMPLES = """\
An examples file has one JSON object a line, about a text, a picture or a sound; answer and thought may be left out:

  {"prompt": "A: red. B: blue. Which colour?", "look": "B: blue.", "answer": "blue"}
  {"messages": [{"role": "user", "content": "..."}], "look": [12, 31], "answer": "yes"}
  {"image": "cat.png", "question": "What is this?", "box": [40, 10, 200, 180], "answer": "cat", "thought": "I see ...</think>"}
  {"audio": "bells.wav", "seconds": [0.5, 1.2], "question": "What is heard?", "answer": "a bell"}

look is quoted words, [first character, end] of the prompt (of the last message), or a list of them; occurrence says which of equal
ones, from 0. The box is (left, top, right, bottom) in pixels, or in its own unit. A sound is a WAV file. Paths begin at the file's
folder. thought is what the model has said before its answer; for Whisper, what it has written.
"""


def add_examples_file(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--examples-file", type=Path, metavar="FILE", help=f"JSON lines: examples for your own model (default: {default})"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", metavar="TYPE",
        help="of your own model's weights: float32, bfloat16, float16, or auto, as they were saved (default: %(default)s)",
    )  # fmt: skip


def add_scenes(parser: argparse.ArgumentParser, default: int | None, what: str, *, former: str | None = None) -> None:
    add_option(
        parser, "--scenes", former=former, type=positive, default=default, metavar="N",
        help=f"{what}, from 1 (default: %(default)s)" if default is not None else what,
    )  # fmt: skip


def add_seed(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help=f"of {what}, from 0 (default: %(default)s)")


def add_device(parser: argparse.ArgumentParser, allowed: str = "any that torch can use: cpu, cuda, cuda:1") -> None:
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help=f"where it runs; {allowed} (default: %(default)s)")


def add_output(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path(f"hf_steer_{name}"), metavar="DIR",
        help=f"folder for {what}; made when it is not there (default: %(default)s)",
    )  # fmt: skip


def check_output(folder: Path) -> None:
    """Whether it is a folder that can be written, or can be made one, before anything is computed for it; nothing is made.

    Raises:
        FileError: it is not.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    if not there.is_dir():
        raise FileError(f"{there} is no folder, and --output {folder} needs one there; choose another with --output.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FileError(f"{there} cannot be written, and --output {folder} would be there; choose another with --output.")
