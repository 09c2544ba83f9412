"""Long text without facts that are asked for, out of a small grammar; nothing of it is in both splits."""

from __future__ import annotations

import random
from collections.abc import Mapping

_PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "choose": (
        ("The old teacher", "A quiet neighbour", "The young baker", "My cousin", "The tall painter", "A tired sailor"),
        ("walked to", "came back from", "wrote about", "dreamed of", "spoke of", "drew"),
        ("the village square", "a small chapel", "the long beach", "an empty theatre", "the narrow street", "a stone wall"),
        ("early in the morning.", "after the storm.", "without a word.", "for the third time.", "in late summer.", "for fun."),
    ),
    "report": (
        ("The engineers", "Several visitors", "The committee", "Two students", "The gardeners", "The night crew"),
        ("inspected", "repaired", "described", "cleaned", "photographed", "avoided"),
        ("the main pump", "a row of rusty pipes", "the upper terrace", "the loading ramp", "a broken fence", "the spare generator"),
        ("during the winter.", "before the visit.", "with great care.", "as planned.", "despite the fog.", "once again."),
    ),
}


def filler(split: str, rng: random.Random, words: int) -> list[str]:
    """Sentences of about so many words in all."""
    sentences, count = [], 0
    while count < words:
        sentences.append(" ".join(rng.choice(part) for part in _PARTS[split]))
        count += len(sentences[-1].split())
    return sentences
