"""What a verification found: a table, and a verdict in a sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hf_steer.errors import ContractError
from hf_steer.testing.report import Check, Checked

_WORDS = {True: "holds", False: "BROKEN", None: "not shown"}


@dataclass(frozen=True)
class Verification(Checked):
    """What `hf_steer.verify` found, in the order of `hf_steer.verify.PROMISES`; `print` it for a table.

    Attributes:
        patched: whether it was patched already, and that patch was verified; else one was made for the checks.
        passes: forward passes of the language model that it took, single tokens of `generate` included.
        tokens: that went through these passes, rows and padding included.
        budget: passes that it takes at most.
    """

    patched: bool
    passes: int
    tokens: int
    budget: int

    @property
    def broken(self) -> tuple[Check, ...]:
        """What does not hold."""
        return self.that(False)

    @property
    def unshown(self) -> tuple[Check, ...]:
        """What this model, or these inputs, show nothing of."""
        return self.that(None)

    @property
    def holds(self) -> bool:
        """Whether all that could be shown holds, and something could."""
        return self.sound

    @property
    def verdict(self) -> str:
        """In a sentence."""
        what = "the patch of this model" if self.patched else "hf_steer on this model"
        if self.broken:
            names = ", ".join(check.name for check in self.broken)
            return (
                f"Do not rely on {what}: {len(self.broken)} of {len(self.checks)} promises are broken ({names}). Where the model "
                "runs as it should without hf_steer, please report it with this table."
            )
        if not self.holds:
            return f"Nothing could be shown of {what}; the table says why."
        shown = len(self.checks) - len(self.unshown)
        if not self.unshown:
            return f"All {shown} promises hold for {what}."
        of = f"{shown} of {len(self.checks)} promises"
        return f"All that could be shown holds for {what}: {of}; the table says why not the others."

    def raise_if_broken(self) -> None:
        """ContractError with the table, unless all that could be shown holds."""
        if not self.holds:
            raise ContractError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "versions": dict(self.versions), "holds": self.holds, "verdict": self.verdict}

    def __str__(self) -> str:
        patch = "its own patch" if self.patched else "a patch made for this"
        wide = max((len(check.name) for check in self.checks), default=0)
        return "\n".join(
            [
                f"{self.model}: {self.place}; {patch}; {self.packages}",
                *(_line(check, wide) for check in self.checks),
                f"{self.passes} passes (at most {self.budget}), {self.tokens} tokens, {self.seconds:.1f} s",
                self.verdict,
            ]
        )


def _line(check: Check, wide: int) -> str:
    measured = "" if check.error is None else f"  error {check.error:.2g}, at most {check.bar:.2g}"
    why = f"  ({check.why})" if check.why else ""
    return f"  {_WORDS[check.passed]:<9}  {check.name:<{wide}}  {check.says}{measured}{why}"
