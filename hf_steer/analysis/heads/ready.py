"""Heads that were found on models that many people have, by name. A list is a file that `hf-steer heads` wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_steer.analysis.heads.candidates import attending
from hf_steer.analysis.heads.origin import HeadProvenance
from hf_steer.analysis.heads.result import HeadResult
from hf_steer.errors import ConfigError, FileError

LISTS = Path(__file__).parent / "lists"
"""The folder of the lists, one `NAME.json` each."""


def head_lists() -> tuple[str, ...]:
    """Names of the lists that come with the package."""
    return tuple(sorted(path.stem for path in LISTS.glob("*.json")))


def load_heads(name: str | os.PathLike[str], model: Any = None) -> dict[int, tuple[int, ...]]:
    """Heads for `AttentionConfig(heads=...)` that `hf-steer heads` found: of a list of this package, or of a file of one's own.

    Args:
        name: of a list, such as `"smollm2-135m-instruct"`, or a path.
        model: that is to be steered by them: checked to be of the type, and to have the layers and heads, of the one that they were
            found on. None checks nothing.

    Raises:
        FileError: no such list or file, or one that `hf-steer heads` did not write.
        ConfigError: the list is for another model.
    """
    result = read_list(name)
    if model is not None:
        if result.provenance is None:
            raise ConfigError(
                f"{os.fspath(name)!r} does not say on which model its heads were found; search again: hf-steer heads."
            )
        _refuse_other(os.fspath(name), result.provenance, model)
    return result.heads


def read_list(name: str | os.PathLike[str]) -> HeadResult:
    """The whole of a list: scores, report and where it comes from; raises as `load_heads` does."""
    path = LISTS / f"{name}.json" if os.fspath(name) in head_lists() else Path(name)
    try:
        return HeadResult.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(head_lists()) or "none"
        raise FileError(
            f"there is no list of heads {os.fspath(name)!r} and no such file ({error}). Lists: {known}. To find heads on a model "
            "of your own: hf-steer heads --model MODEL."
        ) from error
    except ConfigError as error:
        raise FileError(f"{path} is no list of heads: {error}") from error


def _refuse_other(name: str, found: HeadProvenance, model: Any) -> None:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    anatomy = attending(model, "cross" if found.attends == "cross" else "self")
    here: Mapping[str, Any] = {"model type": kind, "layers": len(anatomy.layers), "heads": anatomy.num_heads}
    there = {"model type": found.model_type, "layers": found.layers, "heads": found.heads}
    if here != there:
        faults = "; ".join(f"{own} {there[own]}, here {here[own]}" for own in here if here[own] != there[own])
        raise ConfigError(
            f"the heads of {name!r} were found on {found.model}: {faults}. Heads of one model mean nothing in another; find this "
            "one's with hf-steer heads --model MODEL."
        )
