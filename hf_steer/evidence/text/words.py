"""The words of the reports and facts, split by split: nothing is in both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """One form of a statement with its question.

    Attributes:
        sentence: with `{thing}`, `{value}` and, in reports, `{person}`.
        question: with `{thing}`.
        things: what it may be about, where that differs.
        values: what may be said of it.
        people: who may say it.
    """

    sentence: str
    question: str
    things: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    people: tuple[str, ...] = ()


REPORTS: Mapping[str, Mapping[str, Template]] = {
    "choose": {
        "place": Template(
            "{person} says that the {thing} is in the {value}.", "Where is the {thing}?",
            ("key", "umbrella", "letter", "wallet", "lamp"),
            ("kitchen", "garage", "cellar", "attic", "bathroom", "office", "garden", "hallway"),
            ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry"),
        ),
        "material": Template(
            "In the opinion of {person} the {thing} is made of {value}.", "What is the {thing} made of?",
            ("bowl", "mask", "toy", "shield", "box"),
            ("wood", "iron", "clay", "paper", "wool", "glass", "leather", "stone"),
            ("the cook", "the driver", "the uncle", "the waiter", "the aunt", "the singer"),
        ),
    },
    "report": {
        "colour": Template(
            "{person} remembers that the {thing} was {value}.", "What colour was the {thing}?",
            ("car", "coat", "boat", "door", "bicycle"),
            ("red", "blue", "green", "yellow", "white", "black", "purple", "orange"),
            ("Mr Lee", "Mrs Brook", "Miss Ward", "Dr Khan", "Mr Hill", "Mrs Park", "Miss Young", "Dr Novak"),
        ),
        "animal": Template(
            "{person}: \"The animal that I saw by the {thing} was a {value}.\"", "Which animal was seen by the {thing}?",
            ("river", "bridge", "road", "well", "barn"),
            ("fox", "wolf", "deer", "horse", "bear", "goose", "rabbit", "cow"),
            ("Farmer", "Ranger", "Shepherd", "Hunter", "Miller", "Postman"),
        ),
        "day": Template(
            "According to {person} the {thing} takes place on {value}.", "On which day does the {thing} take place?",
            ("meeting", "concert", "exam", "match", "auction"),
            ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
            ("the newspaper", "the poster", "the radio", "the calendar", "the secretary", "the website"),
        ),
        "city": Template(
            "The {person} wrote that the {thing} comes from {value}.", "Which city does the {thing} come from?",
            ("painting", "statue", "violin", "carpet", "clock"),
            ("Paris", "London", "Rome", "Madrid", "Berlin", "Vienna", "Tokyo", "Cairo"),
            ("dealer", "curator", "critic", "historian", "collector", "heir"),
        ),
    },
}
FACTS: Mapping[str, Template] = {
    "choose": Template(
        "The locker of {thing} opens with the number {value}.", "With which number does the locker of {thing} open?",
        ("Oskar", "Paula", "Quentin", "Rosa", "Stefan", "Tilda", "Ulrich", "Vera"),
    ),
    "report": Template(
        "The access code for the {thing} is {value}.", "What is the access code for the {thing}?",
        ("north tower", "boiler house", "archive", "laboratory", "hangar", "lighthouse", "observatory", "greenhouse"),
    ),
}
