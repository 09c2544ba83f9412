"""People report different things about one matter, and a question leaves open whom to believe: the prompts of `demo --real`."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ASK = {"choose": "Reply briefly.", "report": "Answer in a few words."}
SENTENCES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "choose": {
        "meal": ("{who} thinks that the guest ordered the {value}.", "What did the guest order?"),
        "instrument": ("According to {who} the child plays the {value}.", "Which instrument does the child play?"),
    },
    "report": {
        "fruit": ("{who} saw a {value} in the basket.", "What was in the basket?"),
        "vehicle": ("{who} says the visitor came by {value}.", "How did the visitor come?"),
        "month": ("{who} claims the wedding is in {value}.", "When is the wedding?"),
    },
}
"""Split -> kind -> what is said, and what is asked."""
VALUES: Mapping[str, tuple[str, ...]] = {
    "meal": ("soup", "salad", "steak", "pasta", "omelette", "curry"),
    "instrument": ("violin", "trumpet", "piano", "guitar", "drum", "harp"),
    "fruit": ("lemon", "banana", "peach", "melon", "cherry", "pear"),
    "vehicle": ("train", "bus", "taxi", "ferry", "tram", "plane"),
    "month": ("March", "June", "August", "October", "January", "December"),
}
PEOPLE: Mapping[str, tuple[str, ...]] = {
    "choose": ("The nurse", "The miller", "The guard", "The tailor", "The pilot", "The judge"),
    "report": ("Sofia", "Marek", "Yuki", "Carlos", "Ingrid", "Tariq", "Olga", "Pierre"),
}


@dataclass(frozen=True)
class Report:
    """One prompt.

    Attributes:
        text: what the user says.
        spans: its reports, each there once.
        meant: which of them is pointed at.
        answers: the word that each is known by.
    """

    text: str
    spans: tuple[str, ...]
    meant: int
    answers: tuple[str, ...]

    @property
    def before_word(self) -> str:
        """What the pointed-at report says up to its word."""
        return self.spans[self.meant].partition(f" {self.answers[self.meant]}")[0]

    def names(self, said: str) -> int | None:
        """Whose word an answer has: the one report that it follows; None for an answer that has none of them, or several."""
        named = [number for number, word in enumerate(self.answers) if re.search(rf"\b{word}s?\b", said, re.IGNORECASE)]
        return named[0] if len(named) == 1 else None

    def is_right(self, said: str) -> bool:
        """Whether it follows the report that is pointed at, and no other."""
        return self.names(said) == self.meant


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
        sentence, question = SENTENCES[split][kind]
        people, values = rng.sample(PEOPLE[split], 4), rng.sample(VALUES[kind], 4)
        spans = tuple(sentence.format(who=who, value=value) for who, value in zip(people, values, strict=True))
        made.append(Report("\n".join((*spans, f"{question} {ASK[split]}")), spans, rng.randrange(4), tuple(values)))
    return tuple(made)
