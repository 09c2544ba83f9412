"""Prompts in which heads are looked for: lists with four entries of one kind, and a question that does not say which is meant.

They choose heads, and nothing else: what the heads are good for is reported on other prompts, which share neither template nor word
of an answer with these.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

ENTRIES = 4
"""Of the kind that is asked for, in each list."""
OTHERS = 2
"""Entries of other kinds among them."""


@dataclass(frozen=True)
class Kind:
    """Entries of one kind.

    Attributes:
        entry: with `{source}` and `{value}`.
        question: which leaves open which entry is meant.
        reply: how the answer begins; its next word is the value.
        values: that entries may have.
    """

    entry: str
    question: str
    reply: str
    values: tuple[str, ...]


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "herb": Kind(
            "Recipe card {source}: season the soup with {value}.", "Which herb does the soup get?", "The soup gets",
            ("basil", "mint", "thyme", "parsley", "sage", "oregano", "dill", "rosemary"),
        ),
        "sport": Kind(
            "Page {source} of the leaflet: the club offers {value}.", "Which sport does the club offer?", "The club offers",
            ("tennis", "golf", "rugby", "hockey", "rowing", "boxing", "fencing", "judo"),
        ),
        "stock": Kind(
            "Inventory {source}: {value} crates of soap.", "How many crates of soap are there?", "There are",
            ("seven", "twelve", "twenty", "forty", "ninety", "sixty", "eleven", "thirty"),
        ),
        "hours": Kind(
            "Notice {source}: the museum closes at {value} o'clock.", "When does the museum close?", "The museum closes at",
            ("two", "three", "four", "five", "six", "eight", "nine", "ten"),
        ),
        "extension": Kind(
            "Phone list {source}: the plumber has extension {value}.", "Which extension does the plumber have?",
            "The plumber has extension", ("17", "26", "39", "48", "53", "61", "72", "85", "94"),
        ),
        "liquid": Kind(
            "Log entry {source}: the tank was filled with {value}.", "What was the tank filled with?", "The tank was filled with",
            ("water", "milk", "oil", "juice", "vinegar", "syrup", "wine", "petrol"),
        ),
        "instrument": Kind(
            "Programme {source}: the soloist plays the {value}.", "What does the soloist play?", "The soloist plays the",
            ("flute", "harp", "piano", "trumpet", "guitar", "cello", "organ", "oboe"),
        ),
        "trade": Kind(
            "Register {source}: the tenant works as a {value}.", "What does the tenant work as?", "The tenant works as a",
            ("nurse", "lawyer", "pilot", "tailor", "porter", "chemist", "dentist", "butcher"),
        ),
    }
)  # fmt: skip
"""Name -> kind."""
_SOURCES = "ABCDEFGHJKLMNPRSTUVWXYZ"


def search_prompts(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """`count` different prompts, as lines of an examples file: `prompt`, `look`, `thought` and `answer`.

    Args:
        count: how many.
        seed: of all choices.
    """
    random_one = random.Random(f"search {seed}")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        line = _line(random_one)
        found.setdefault(f"{line['prompt']} {line['look']}", line)
    return list(found.values())


def _line(rng: random.Random) -> dict[str, Any]:
    name, *rest = rng.sample(sorted(KINDS), 1 + OTHERS)
    kind, sources = KINDS[name], rng.sample(_SOURCES, ENTRIES + OTHERS)
    values = rng.sample(kind.values, ENTRIES)
    meant = rng.randrange(ENTRIES)
    told = [*((kind, value) for value in values), *((KINDS[other], rng.choice(KINDS[other].values)) for other in rest)]
    lines = [own.entry.format(source=source, value=value) for source, (own, value) in zip(sources, told, strict=True)]
    look = lines[meant]
    rng.shuffle(lines)
    return {
        "prompt": "\n".join([*lines, kind.question]),
        "look": look,
        "thought": kind.reply,
        "answer": f" {values[meant]}",
    }
