"""Which stretches of its prompt each request of a harness points at, and which requests may run together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_steer.errors import ConfigError, shown

LOOK = "look"
"""The field of a document: a stretch of the prompt's text, or a list of them, each there once. Nothing: the document is plain."""


@dataclass(frozen=True)
class Together:
    """Requests that run together.

    Attributes:
        numbers: which ones.
        looks: context -> the stretches that are pointed at in it; None for requests that are not steered at all.
    """

    numbers: tuple[int, ...]
    looks: Mapping[str, tuple[str, ...]] | None


def look_of(document: Any) -> tuple[str, ...]:
    """What a document points at.

    Raises:
        ConfigError: something else than strings.
    """
    said = document.get(LOOK) if isinstance(document, Mapping) else None
    stretches = (said,) if isinstance(said, str) else said or ()
    if not isinstance(stretches, Sequence) or not all(isinstance(each, str) and each for each in stretches):
        raise ConfigError(f"the field {LOOK!r} of a document is a stretch of its prompt or a list of them; got {shown(said)}.")
    return tuple(stretches)


def runs_of(contexts: Sequence[str], looks: Sequence[tuple[str, ...]]) -> list[Together]:
    """Part requests, so that a run has one answer to where to look in each context.

    A harness sorts requests, batches them, and answers those with equal tokens together, so a batch knows its rows by what they
    read. Documents that read the same and point at different stretches are therefore run one after the other.
    """
    plain = tuple(number for number, look in enumerate(looks) if not look)
    runs: list[tuple[list[int], dict[str, tuple[str, ...]]]] = []
    for number, (context, look) in enumerate(zip(contexts, looks, strict=True)):
        if look:
            free = next((run for run in runs if run[1].get(context, look) == look), None)
            if free is None:
                free = ([], {})
                runs.append(free)
            free[0].append(number)
            free[1][context] = look
    steered = [Together(tuple(numbers), where) for numbers, where in runs]
    return ([Together(plain, None)] if plain else []) + steered
