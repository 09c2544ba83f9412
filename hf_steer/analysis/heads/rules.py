"""The rules by which heads are ranked: one row each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from torch import Tensor

from hf_steer.analysis.heads.selection import Head

ORDER: Mapping[str, tuple[tuple[str, int], ...]] = MappingProxyType(
    {
        "mass": (("mass", 1),),
        "localisation": (("localisation", 1), ("entropy", -1), ("mass", 1)),
        "pointing": (("pointing", 1), ("selectivity", 1)),
        "selectivity": (("selectivity", 1),),
        "slope": (("slope", 1),),
        "effect": (("effect", 1),),
    }
)
"""Rule -> the scores by which it ranks heads, and whether the highest (1) or the lowest (-1) comes first; later ones break ties."""
RULES = ("forward", *ORDER)
BY_ANSWER = ("forward", "effect", "slope")
"""Rules that steer and look at the answer; the others look at attention alone."""

TRIED = ("forward", "effect")
"""Of these, those that steer head by head."""


def rank(scores: Mapping[str, Tensor]) -> dict[str, tuple[Head, ...]]:
    """Rule -> all heads, the best first; for the rules whose scores are there."""
    rankings = {}
    for rule, keys in ORDER.items():
        if all(name in scores for name, _ in keys):
            columns = [-sign * scores[name].flatten().numpy() for name, sign in reversed(keys)]  # lexsort: the last one leads
            heads = scores[rule].shape[1]
            rankings[rule] = tuple((int(place) // heads, int(place) % heads) for place in np.lexsort(columns))
    return rankings
