"""People report different things about one matter, and a question leaves open whom to believe: the prompts of `demo --real`."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_steer.evidence.text.cases import Case, four_reports
from hf_steer.evidence.text.words import Template

ASK = {"choose": "Reply briefly.", "report": "Answer in a few words."}
_NURSE = ("The nurse", "The miller", "The guard", "The tailor", "The pilot", "The judge")
_SOFIA = ("Sofia", "Marek", "Yuki", "Carlos", "Ingrid", "Tariq", "Olga", "Pierre")
SENTENCES: Mapping[str, Mapping[str, Template]] = {
    "choose": {
        "meal": Template(
            "{person} thinks that the guest ordered the {value}.", "What did the guest order?", people=_NURSE,
            values=("soup", "salad", "steak", "pasta", "omelette", "curry"),
        ),
        "instrument": Template(
            "According to {person} the child plays the {value}.", "Which instrument does the child play?", people=_NURSE,
            values=("violin", "trumpet", "piano", "guitar", "drum", "harp"),
        ),
    },
    "report": {
        "fruit": Template(
            "{person} saw a {value} in the basket.", "What was in the basket?", people=_SOFIA,
            values=("lemon", "banana", "peach", "melon", "cherry", "pear"),
        ),
        "vehicle": Template(
            "{person} says the visitor came by {value}.", "How did the visitor come?", people=_SOFIA,
            values=("train", "bus", "taxi", "ferry", "tram", "plane"),
        ),
        "month": Template(
            "{person} claims the wedding is in {value}.", "When is the wedding?", people=_SOFIA,
            values=("March", "June", "August", "October", "January", "December"),
        ),
    },
}  # fmt: skip
"""Split -> kind -> what is said and asked, by whom, and of what."""


@dataclass(frozen=True)
class Report(Case):
    """A case that is judged more strictly: an answer that has several of the words follows none of the reports."""

    @property
    def before_word(self) -> str:
        """What the pointed-at report says up to its word."""
        return self.spans[self.meant].partition(f" {self.answers[self.meant]}")[0]

    def names(self, said: str) -> int | None:
        """Whose word an answer has: the one report that it follows; None for an answer that has none of them, or several."""
        named = [number for number, word in enumerate(self.answers) if re.search(rf"\b{word}s?\b", said, re.IGNORECASE)]
        return named[0] if len(named) == 1 else None


def make_reports(split: str, count: int, *, seed: int = 0) -> Sequence[Report]:
    """`count` prompts of four reports each.

    Args:
        split: `"choose"` or `"report"`; they share no sentence, question, word or person.
        count: how many.
        seed: of all choices.
    """
    rng = random.Random(f"{split} {seed}")
    made = []
    for _ in range(count):
        kind = rng.choice(sorted(SENTENCES[split]))
        spans, question, meant, values = four_reports(SENTENCES[split][kind], rng)
        made.append(Report("reports", kind, "\n".join((*spans, f"{question} {ASK[split]}")), spans, meant, values))
    return tuple(made)
