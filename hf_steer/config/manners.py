"""How scores are scaled, whether groups keep their attention, and how hard is steered, where a configuration leaves it open.

One row per kind of statement. λ is always a difference of logits: against a token that scores 0, one that scores 1 is looked at
with odds that are e^λ times what they were, however much of the prompt is pointed at. The figures were chosen on other prompts,
pictures and sounds than those of the reports; see docs/heads-strength-when.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

AUTO: Literal["auto"] = "auto"
"""Says that the kind of statement decides; for a backend, that the call does."""


@dataclass(frozen=True)
class Manner:
    """How one kind of statement is put into effect.

    Attributes:
        normalize: a key of `saliency.normalize.NORMALIZERS`.
        preserve_mass: whether each group keeps its share of attention.
        strength: λ.
        queries: a key of `config.attention.QUERIES`.
    """

    normalize: str
    preserve_mass: bool
    strength: float
    queries: str


MANNERS: Mapping[str, Manner] = MappingProxyType(
    {
        "tokens": Manner("maxabs", preserve_mass=False, strength=1.0, queries="generated"),
        "region": Manner("maxabs", preserve_mass=True, strength=10.0, queries="all"),
        "sound": Manner("maxabs", preserve_mass=True, strength=3.0, queries="all"),
        "source": Manner("zscore", preserve_mass=True, strength=1.0, queries="all"),
    }
)
"""Kind -> its manner: scores of text, something in a picture or video, seconds of a sound, and what a source sees by itself."""
