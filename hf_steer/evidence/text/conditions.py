"""Under which conditions cases are answered: what is said, how it steers, and what is asked instead by those who do not steer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hf_steer.config import AttentionConfig, SaliencyConfig
from hf_steer.config.checks import Heads
from hf_steer.evidence.text.cases import Case

RANDOM_SETS = 10
"""Random sets of heads of each kind."""


@dataclass(frozen=True)
class Condition:
    """One way to put the same questions.

    Attributes:
        name: in the table.
        gaze: how heads are steered; None for an unsteered model.
        look: which span is pointed at, by its number; `"all"` for the whole text, `"shuffled"` for as many tokens anywhere.
        ask: the text that is sent.
        sets: several gazes that are one condition: random heads. Each answers a part of the cases.
    """

    name: str
    gaze: AttentionConfig | None = None
    look: Callable[[Case], int] | str = "meant"
    ask: Callable[[Case], str] = lambda case: case.text
    sets: tuple[AttentionConfig, ...] = ()


def other_span(case: Case) -> int:
    """One that is not meant: the next."""
    return (case.meant + 1) % len(case.spans)


def _told_where(case: Case) -> str:
    """The plain way: say in words which sentence counts."""
    places = ("first", "second", "third", "fourth")
    return f"{case.text}\nPay attention only to the {places[case.meant]} of the statements or instructions above."


def _said_twice(case: Case) -> str:
    """The sentence that counts, quoted again at the end."""
    return f'{case.text}\nPay attention to this: "{case.spans[case.meant]}"'


def conditions(shape: tuple[int, int], found: Mapping[int, tuple[int, ...]] | None, *, seed: int = 0) -> dict[str, Condition]:
    """All conditions of the full table, by name.

    Args:
        shape: layers, and heads in each.
        found: heads that were found on other prompts; None to leave them out.
        seed: of the random sets.
    """
    late: Heads = {layer: "all" for layer in range(2 * shape[0] // 3, shape[0])}
    plain = SaliencyConfig(source=None)
    table = [Condition("unsteered"), Condition("default", _gaze())]
    table += [Condition(f"all heads, λ = {value:g}", _gaze(strength=value)) for value in (0.5, 1.5, 2.0, 3.0)]
    table += [Condition(f"all queries, λ = {value:g}", _gaze(strength=value, queries="all")) for value in (1.0, 2.0)]
    table += [Condition(f"last third, λ = {value:g}", _gaze(heads=late, strength=value)) for value in (1.0, 2.0, 3.0)]
    for method, strength in (("zscore", 1.0), ("minmax", 1.0), ("rank", 1.0)):
        scaled = SaliencyConfig(source=None, normalize=method)  # type: ignore[arg-type]
        table.append(Condition(f"{method}, λ = {strength:g}", AttentionConfig(saliency=scaled, strength=strength)))
    table += [Condition(f"share {value:g}", AttentionConfig(saliency=plain, share=value)) for value in (0.1, 0.2, 0.3)]
    table.append(Condition("default, gate", _gaze(gate="entropy")))
    table += [
        Condition("wrong span", _gaze(), look=other_span),
        Condition("shuffled", _gaze(), look="shuffled"),
        Condition("uniform", _gaze(), look="all"),
    ]
    if found is not None:
        table += [Condition(f"found heads, λ = {value:g}", _gaze(heads=found, strength=value)) for value in (1.0, 1.5, 2.0, 3.0)]
        table += [
            Condition(f"found heads, all queries, λ = {value:g}", _gaze(heads=found, strength=value, queries="all"))
            for value in (1.0, 2.0, 3.0)
        ]
        table += [
            Condition(f"found heads, share {value:g}", AttentionConfig(heads=found, saliency=plain, share=value))
            for value in (0.2, 0.3, 0.5)
        ]
        table += [
            Condition(f"random heads, {kind}, λ = 2", sets=tuple(_gaze(heads=own, strength=2.0) for own in drawn))
            for kind, drawn in random_heads(found, shape, seed=seed).items()
        ]
    table += [
        Condition("prompt: told which", ask=_told_where),
        Condition("prompt: said twice", ask=_said_twice),
    ]
    return {own.name: own for own in table}


def random_heads(
    found: Mapping[int, tuple[int, ...]], shape: tuple[int, int], *, seed: int
) -> Mapping[str, Sequence[Mapping[int, tuple[int, ...]]]]:
    """As many heads as were found: in the same layers, and anywhere."""
    layers, heads = shape
    rng = random.Random(seed)
    same = [{layer: tuple(sorted(rng.sample(range(heads), len(own)))) for layer, own in found.items()} for _ in range(RANDOM_SETS)]
    every, count = [(layer, head) for layer in range(layers) for head in range(heads)], sum(map(len, found.values()))
    anywhere = []
    for _ in range(RANDOM_SETS):
        drawn: dict[int, tuple[int, ...]] = {}
        for layer, head in sorted(rng.sample(every, count)):
            drawn[layer] = (*drawn.get(layer, ()), head)
        anywhere.append(drawn)
    return {"same layers": same, "anywhere": anywhere}


def _gaze(**attention: object) -> AttentionConfig:
    return AttentionConfig(saliency=SaliencyConfig(source=None), **attention)  # type: ignore[arg-type]
