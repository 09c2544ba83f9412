"""What is said of a prompt, as a value, and how two statements combine into one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.saliency.regions import OPERATIONS, Joint, Region, Term, regions_of

Own = TypeVar("Own", bound="Statement")


@dataclass(frozen=True, eq=False)
class Statement:
    """Scores of tokens, or of pictures and sounds.

    Attributes:
        tokens: `(batch, prompt tokens)` scores, for a statement about tokens.
        terms: what is said of pictures and sounds, to be summed.
        regions: all that are named in them.
        kind: what it is about, a key of `config.manners.MANNERS`: `"tokens"`, `"sound"`, or `"region"` of a picture or video.
    """

    tokens: Tensor | None = None
    terms: tuple[Term, ...] = ()
    regions: tuple[Region, ...] = field(init=False, default=())
    kind: str = field(init=False, default="tokens")

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", regions_of(self.terms))
        if self.regions:
            heard = all(region.modality == "audio" for region in self.regions)
            object.__setattr__(self, "kind", "sound" if heard else "region")

    def __deepcopy__(self: Own, memo: dict[int, Any]) -> Own:
        """Itself: it is frozen, and a copied cache still carries the same statement."""
        return self

    def __add__(self: Own, other: Own) -> Own:
        return self._combined(other, "sum")

    def __and__(self: Own, other: Own) -> Own:
        return self._combined(other, "least")

    def __mul__(self: Own, other: Own | float) -> Own:
        other = other.item() if isinstance(other, Tensor) and not other.ndim else other
        if not isinstance(other, Real) or isinstance(other, bool):
            return self._combined(other, "product")
        weight = float(other)
        if not math.isfinite(weight):
            raise SaliencyError(f"the weight of a statement must be a finite number; got {weight}.")
        if self.tokens is not None:
            return type(self)(tokens=self.tokens * weight)
        return type(self)(terms=tuple(replace(term, weight=term.weight * weight) for term in self.terms))

    __rmul__ = __mul__

    def _combined(self: Own, other: Any, operation: str) -> Own:
        """Token scores at once, regions as terms: what they are on tokens is known with the prompt."""
        if not isinstance(other, Statement):
            return NotImplemented  # type: ignore[no-any-return]
        if (self.tokens is None) != (other.tokens is None):
            raise SaliencyError("token scores and regions cannot be combined; they are scaled over different tokens.")
        if self.tokens is None or other.tokens is None:
            both = (*self.terms, *other.terms)
            return type(self)(terms=both if operation == "sum" else (Joint(operation, self.terms, other.terms),))
        if self.tokens.shape != other.tokens.shape:
            shapes = f"{tuple(self.tokens.shape)} and {tuple(other.tokens.shape)}"
            raise SaliencyError(f"token scores of shapes {shapes} cannot be combined; both are (batch, prompt tokens).")
        return type(self)(tokens=OPERATIONS[operation](self.tokens, other.tokens))
