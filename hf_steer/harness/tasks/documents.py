"""The documents of our two tasks, made on the spot: nothing is downloaded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from hf_steer.evidence.reports import make_reports

COUNT, SEED = 300, 0
CAPITALS: Mapping[str, str] = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Ireland": "Dublin", "Portugal": "Lisbon",
    "Sweden": "Stockholm", "Norway": "Oslo", "Poland": "Warsaw", "Hungary": "Budapest", "Canada": "Ottawa", "Cuba": "Havana",
    "Peru": "Lima", "Kenya": "Nairobi", "Turkey": "Ankara", "Thailand": "Bangkok", "Finland": "Helsinki", "Denmark": "Copenhagen",
}  # fmt: skip
OPPOSITES: Mapping[str, str] = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "old": "young", "fast": "slow",
    "rich": "poor", "open": "closed", "wet": "dry", "full": "empty", "happy": "sad", "strong": "weak", "light": "dark",
    "early": "late", "near": "far", "high": "low", "soft": "hard", "first": "last", "black": "white",
}  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)
YOUNG: Mapping[str, str] = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb", "pig": "piglet", "duck": "duckling",
    "chicken": "chick", "lion": "cub", "goat": "kid", "deer": "fawn", "swan": "cygnet",
}  # fmt: skip
KINDS: Mapping[str, Mapping[str, str]] = {
    "What is the capital of {}?": CAPITALS,
    "What is the opposite of {}?": OPPOSITES,
    "Which month comes after {}?": dict(zip(MONTHS, (*MONTHS[1:], MONTHS[0]), strict=True)),
    "What is a young {} called?": YOUNG,
    "What is {}?": {f"{one} plus {two}": str(one + two) for one in range(2, 10) for two in range(2, 10)},
}
"""Question -> what is asked about -> the right answer; wrong ones are right answers to other questions of the kind."""


def reports(**_: Any) -> Any:
    """Prompts of `hf-steer demo --real`, the part that chose nothing."""
    made = make_reports("report", COUNT, seed=SEED)
    return _dataset(
        {"text": each.text, "choices": list(each.answers), "meant": each.meant, "look": [each.spans[each.meant]]} for each in made
    )


def ability(**_: Any) -> Any:
    """Every question there is, once, and four answers in random order."""
    return _dataset(_questions(random.Random(SEED)))


def _questions(drawn: random.Random) -> Iterator[dict[str, Any]]:
    for asked, known in KINDS.items():
        for thing, answer in known.items():
            wrong = sorted(set(known.values()) - {answer, thing})
            choices = [answer, *drawn.sample(wrong, 3)]
            drawn.shuffle(choices)
            question = asked.format(thing)
            yield {"question": question, "choices": choices, "right": choices.index(answer), "look": [question]}


def _dataset(documents: Iterator[dict[str, Any]]) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(list(documents))})
