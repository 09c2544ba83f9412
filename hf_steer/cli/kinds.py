"""Kinds of values: from a word of the command line to a value, or to a usage error that says what is allowed."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from hf_steer.config import SteerConfig
from hf_steer.errors import ConfigError, FileError

Kind = Callable[[str], Any]

UNITS = ("pixels", "fraction", "thousandths")
"""`hf_steer.saliency.UNITS`, without importing torch for `--help`."""


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, least=1)


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, least=0)


def number(text: str) -> float:
    """A number, not infinite."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number, such as 0.5; got {text!r}")
    return value


def seconds(text: str) -> float:
    """A duration."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative; got {text}")
    return value


def word(text: str) -> str:
    """A word that the command looks up itself."""
    return text.strip()


def one_of(allowed: Sequence[str]) -> Kind:
    """One of a few words."""

    def choose(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(allowed)}; got {text!r}{nearest(text, allowed)}")
        return text

    return choose


def box(text: str) -> tuple[float, ...]:
    """Left, top, right and bottom."""
    try:
        sides = tuple(number(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        sides = ()
    if len(sides) != 4:
        raise argparse.ArgumentTypeError(f"must be four numbers with commas between them, left,top,right,bottom; got {text!r}")
    return sides


class Several(argparse.Action):
    """Values with commas between them; given again, it adds to what was given before."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, kind: Kind, **settings: Any) -> None:
        def split(text: str) -> tuple[Any, ...]:
            return tuple(kind(part) for part in text.split(","))

        super().__init__(option_strings, dest, type=split, **settings)

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        parts = chain.from_iterable(values) if self.nargs else values
        vars(namespace)[self.dest] = (*(getattr(namespace, self.dest) or ()), *parts)


def read_heads(text: str) -> Any:
    """Heads as `AttentionConfig` takes them, from JSON or from a file with it, such as a saved calibration, or of a list by name.

    Raises:
        FileError: neither.
        ConfigError: not heads.
    """
    if text == "all":
        return "all"
    if is_list(text):
        from hf_steer.analysis.heads import load_heads

        return load_heads(text)
    try:
        values = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f'--heads must be "all", JSON such as {{"1": [0, 3]}}, a file with it, or a list by name; got {text!r} ({error}).'
        raise FileError(message) from error
    heads = values.get("heads", values) if isinstance(values, dict) else values
    attention = SteerConfig.from_dict({"schema_version": 1, "attention": {"heads": heads}}).attention
    return None if attention is None else attention.heads


def is_list(text: str) -> bool:
    """Whether it names a list of heads that comes with the package."""
    from hf_steer.analysis.heads import head_lists

    return text in head_lists()


def refuse_list_of_other(text: str, model: Any) -> None:
    """ConfigError where heads are those of a list by name, and the list is for another model."""
    from hf_steer.analysis.heads import load_heads

    if is_list(text):
        load_heads(text, model)


def check_device(text: str) -> str:
    """The name of a device that torch can use here.

    Raises:
        ConfigError: it is none.
    """
    import torch

    try:
        torch.empty(0, device=text).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own way to say so
        reason = str(error).partition("\n")[0]
        message = f"--device must be one that torch can use here, such as cpu or cuda; got {text!r} ({reason})."
        raise ConfigError(f"{message} Leave it out to use the CPU.") from error
    return text


def nearest(given: str, known: Iterable[str]) -> str:
    """The end of a message: a question for the nearest of the known words, when one is near."""
    found = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _whole(text: str, *, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}; got {text!r}")
    return value
