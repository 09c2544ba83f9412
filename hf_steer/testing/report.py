"""What came of checking one model: a line per promise of the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from hf_steer.errors import ContractError
from hf_steer.ground.implementations import implementation_of
from hf_steer.ground.parts import Anatomy


class CannotShow(Exception):
    """Raised by a check that this model, or this batch, can show nothing of; the message says why. It never leaves the package."""


@dataclass(frozen=True)
class Finding:
    """What one check saw.

    Attributes:
        holds: whether the promise is kept.
        error: largest deviation, where something was compared.
        bar: the largest that is allowed; 0 where results must be equal bit by bit.
        note: what was seen, in words.
    """

    holds: bool
    error: float | None = None
    bar: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Check:
    """One promise, and whether this model keeps it.

    Attributes:
        name: of the promise, a key of `hf_steer.testing.PROMISES`.
        says: the promise in a sentence.
        passed: None where it was skipped.
        error: largest deviation that was seen; None where nothing was compared.
        bar: the largest that is allowed; 0 where results must be equal bit by bit.
        why: why it failed or was skipped, or what else was seen.
    """

    name: str
    says: str
    passed: bool | None
    error: float | None = None
    bar: float | None = None
    why: str = ""

    def __str__(self) -> str:
        word = {True: "passed", False: "FAILED", None: "skipped"}[self.passed]
        measured = "" if self.error is None else f"  error {self.error:.3g}, at most {self.bar:.3g}"
        return f"{word:<8} {self.name:<18} {self.says}{measured}{f'  ({self.why})' if self.why else ''}"


@dataclass(frozen=True)
class Checked:
    """One model that was checked, and what came of it.

    Attributes:
        model: its class.
        family: `config.model_type`.
        implementation: of attention; None without a language model.
        dtype: of its weights, such as `"bfloat16"`.
        device: where they lie.
        versions: of the packages that the result depends on.
        seconds: that the checks took.
        checks: in the order of the promises.
    """

    model: str
    family: str
    implementation: str | None
    dtype: str
    device: str
    versions: tuple[tuple[str, str], ...]
    seconds: float
    checks: tuple[Check, ...]

    def that(self, passed: bool | None) -> tuple[Check, ...]:
        """The checks that came out so."""
        return tuple(check for check in self.checks if check.passed is passed)

    @property
    def sound(self) -> bool:
        """Whether no promise is broken, and at least one was shown to be kept."""
        return not self.that(False) and len(self.that(None)) < len(self.checks)

    @property
    def place(self) -> str:
        """What was checked where, in words."""
        return f"{self.family}, {self.implementation or 'no language model'}, {self.dtype} on {self.device}"

    @property
    def packages(self) -> str:
        """The versions in words."""
        return ", ".join(f"{name} {version}" for name, version in self.versions)


def facts_of(anatomy: Anatomy) -> dict[str, Any]:
    """What a report says of a model."""
    root, decoder = anatomy.root, anatomy.decoder
    return {
        "model": type(root).__name__,
        "family": anatomy.family,
        "implementation": None if decoder is None else implementation_of(decoder.config),
        "dtype": str(root.dtype).removeprefix("torch."),
        "device": str(next(root.parameters()).device),
        "versions": (("torch", torch.__version__), ("transformers", transformers.__version__)),
    }


@dataclass(frozen=True)
class ContractReport(Checked):
    """All checks of one model on one batch, in the order of `hf_steer.testing.PROMISES`; `print` it for a table."""

    @property
    def failed(self) -> tuple[Check, ...]:
        """The promises that are broken."""
        return self.that(False)

    @property
    def skipped(self) -> tuple[Check, ...]:
        """The promises of which this model and this batch show nothing."""
        return self.that(None)

    @property
    def passed(self) -> bool:
        """Whether no promise is broken, and at least one was shown to be kept."""
        return self.sound

    def raise_if_failed(self) -> None:
        """ContractError with all promises that are broken, or for a report in which nothing was shown."""
        if self.passed:
            return
        lines = [str(check) for check in self.failed or self.checks]
        what = f"breaks {len(self.failed)} of {len(self.checks)} promises" if self.failed else "shows nothing on this batch"
        raise ContractError(
            f"this {self.model} ({self.place}) {what}:\n  " + "\n  ".join(lines) + "\nWhere the model runs as it should without "
            "hf_steer, please report it with this text."
        )

    def __str__(self) -> str:
        kept = len(self.checks) - len(self.failed) - len(self.skipped)
        return "\n".join(
            [
                f"{self.model}: {self.place}; {self.packages}",
                *(f"  {check}" for check in self.checks),
                f"{kept} passed, {len(self.failed)} failed, {len(self.skipped)} skipped in {self.seconds:.1f} s",
            ]
        )
