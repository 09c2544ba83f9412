"""Questions about a text in which several stretches could be meant, and the one that is pointed at decides.

Two splits that share no template, word of an answer, name or question: `"choose"`, on which heads, strengths and scalings are
chosen, and `"report"`, which chose nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hf_steer.evidence.text.filler import filler
from hf_steer.evidence.text.instructions import INSTRUCTIONS, MANNERLY, SUBJECTS, is_obeyed
from hf_steer.evidence.text.words import FACTS, REPORTS, Template

SPLITS = ("choose", "report")


@dataclass(frozen=True)
class Case:
    """One prompt with several stretches of text, one of them meant.

    Attributes:
        task: a key of `TASKS`.
        kind: template, sort of instruction, or length.
        text: what the user says.
        spans: stretches of it that could be meant, each there once.
        meant: which of them is.
        answers: what an answer by each span is known by: a word, or a name of `instructions.CHECKS`; empty where it asks nothing.
    """

    task: str
    kind: str
    text: str
    spans: tuple[str, ...]
    meant: int
    answers: tuple[str, ...]

    def names(self, said: str) -> int | None:
        """Which span an answer follows: the first that it names; None where it follows none of them."""
        if self.task == "instruction":
            return self.meant if is_obeyed(self.answers[self.meant], said) else None
        places = {number: said.lower().find(word.lower()) for number, word in enumerate(self.answers)}
        named = [number for number, place in places.items() if place >= 0]
        return min(named, key=places.__getitem__, default=None)

    def is_right(self, said: str) -> bool:
        """Whether an answer follows the span that is meant."""
        return self.names(said) == self.meant


def _reports(split: str, rng: random.Random, length: int) -> Case:
    """Four people report different things about one matter; the question leaves open whom to believe."""
    kind = rng.choice(sorted(REPORTS[split]))
    spans, question, meant, values = four_reports(REPORTS[split][kind], rng)
    return Case("reports", kind, "\n".join((*spans, question)), spans, meant, values)


def four_reports(template: Template, rng: random.Random) -> tuple[tuple[str, ...], str, int, tuple[str, ...]]:
    """What four people say, the question, whose report is meant, and the word that each is known by."""
    people, values = rng.sample(template.people, 4), rng.sample(template.values, 4)
    thing = rng.choice(template.things) if template.things else ""
    spans = tuple(template.sentence.format(person=who, thing=thing, value=what) for who, what in zip(people, values, strict=True))
    return spans, template.question.format(thing=thing), rng.randrange(4), tuple(values)


def _instruction(split: str, rng: random.Random, length: int) -> Case:
    """An instruction whose following can be checked among three whose cannot, and a question; is it obeyed?"""
    kind = rng.choice(sorted(INSTRUCTIONS[split]))
    spans = rng.sample(MANNERLY[split], 3)
    meant = rng.randrange(4)
    spans.insert(meant, rng.choice(INSTRUCTIONS[split][kind]))
    text = "\n".join((rng.choice(SUBJECTS[split]), *spans))
    return Case("instruction", kind, text, tuple(spans), meant, tuple(kind if number == meant else "" for number in range(4)))


def _fact(split: str, rng: random.Random, length: int) -> Case:
    """A fact in the middle of a long text, among facts of the same kind, and a question about just that one."""
    template = FACTS[split]
    things = rng.sample(template.things, 4)
    values = [str(rng.randrange(1000, 10000)) for _ in things]
    spans = tuple(template.sentence.format(thing=thing, value=value) for thing, value in zip(things, values, strict=True))
    meant = rng.randrange(4)
    parts = filler(split, rng, length)
    for number, span in enumerate(spans):  # at a fifth, two fifths ... of the way
        parts.insert(int(len(parts) * (number + 1) / (len(spans) + 1)), span)
    text = " ".join(parts) + "\n" + template.question.format(thing=things[meant])
    return Case("fact", f"{length} words", text, spans, meant, tuple(values))


TASKS: Mapping[str, Callable[[str, random.Random, int], Case]] = {
    "reports": _reports, "instruction": _instruction, "fact": _fact,
}  # fmt: skip


def make_cases(task: str, split: str, count: int, *, seed: int = 0, words: int = 600) -> Sequence[Case]:
    """`count` different cases of a task.

    Args:
        task: a key of `TASKS`.
        split: one of `SPLITS`.
        count: how many.
        seed: of all choices.
        words: about how long the text of `"fact"` is; the others have the length that they have.
    """
    rng = random.Random(f"{task} {split} {seed}")
    cases: dict[str, Case] = {}
    while len(cases) < count:
        case = TASKS[task](split, rng, words)
        cases.setdefault(f"{case.text} {case.meant}", case)
    return tuple(cases.values())
