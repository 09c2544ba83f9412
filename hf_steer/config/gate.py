"""When to steer: gates that open while the model is uncertain, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_steer.config.checks import check_count, check_flag, check_number
from hf_steer.config.options import fill_options
from hf_steer.errors import ConfigError, shown
from hf_steer.registry import GATES, Gate

OPTIONS = ("threshold", "release", "phrases", "hold_tokens")
"""Those that have a field; which of them a kind has, and their defaults, its row of `registry.GATES` says."""


@dataclass(frozen=True)
class GateConfig:
    """Steer a row only while it is uncertain. The gate multiplies λ: 1 is open, 0 is unsteered.

    Every row of a batch, and every beam, has a gate of its own. It needs no second generation: a query's gate comes from the
    tokens up to it and from the distribution of the step before. Queries of the prompt, and the first generated token of a
    gate that measures distributions, get `initial`.

    Args:
        kind: `"entropy"`: normalised entropy (0 to 1: entropy over log vocabulary) of the previous step's next-token
            distribution is over `threshold`. `"margin"`: the two likeliest tokens' probabilities differ by less than `threshold`.
            `"self_report"`: a phrase such as "wait" was just said in the thinking text. Others that plugins or `register_gate`
            have added.
        threshold: opens the gate; a share of the largest entropy, or a difference of probabilities, in [0, 1].
        release: closes it again (hysteresis): at most `threshold` for entropy, at least for margin.
        zscore: an entropy gate compares with the row's own running mean: `threshold` and `release` are z-scores, and the
            first four distributions only make the mean.
        soft: instead of 0 or 1, a value between: linear from `release` to `threshold`; for phrases linear from 1 down to 0
            over `hold_tokens`.
        phrases: as they are said, upper or lower case at the start; matched as token sequences that may straddle steps.
        hold_tokens: how many tokens a phrase keeps the gate open, at least 1.
        initial: the gate before anything was measured, in [0, 1].
        options: those of a gate that somebody else added, and for which there is no field.
    """

    kind: str = "entropy"
    threshold: float | None = None
    release: float | None = None
    zscore: bool = False
    soft: bool = False
    phrases: tuple[str, ...] | None = None
    hold_tokens: int | None = None
    initial: float = 0.0
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        row = GATES.find(self.kind, "gate.kind must be one of {known}; got {got}{near}.")
        check_flag("gate.zscore", self.zscore)
        if self.zscore and row.zscore is None:
            able = " and ".join(name for name, own in GATES.items() if own.zscore is not None)
            raise ConfigError(f"gate.zscore is of {able} gates; this one is a {self.kind!r} gate.")
        if row.measures is not None and self.threshold is not None and self.release is None:
            object.__setattr__(self, "release", self.threshold)  # no hysteresis that was not asked for
        relative = (row.zscore if self.zscore else None) or {}
        fill_options(self, f"a {self.kind!r} gate", {**row.options, **relative}, OPTIONS)
        check_flag("gate.soft", self.soft)
        object.__setattr__(self, "initial", check_number("gate.initial", self.initial))
        if not 0 <= self.initial <= 1:
            raise ConfigError(f"gate.initial must lie in [0, 1]; got {self.initial}.")
        if row.measures is not None:
            self._check_thresholds(row)
        if self.phrases is not None:
            self._check_phrases()
        if self.hold_tokens is not None:
            object.__setattr__(self, "hold_tokens", check_count("gate.hold_tokens", self.hold_tokens))

    @property
    def row(self) -> Gate:
        """What the table knows of its kind."""
        return GATES[self.kind]

    def _check_thresholds(self, row: Gate) -> None:
        low, high = row.bounds
        for name in ("threshold", "release"):
            object.__setattr__(self, name, check_number(f"gate.{name}", getattr(self, name)))
            if not self.zscore and not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"gate.{name} of a {self.kind!r} gate must lie in [{low:g}, {high:g}]; got {getattr(self, name)}."
                )
        opens, closes = float(self.threshold or 0), float(self.release or 0)
        wrong = closes < opens if row.falls else closes > opens
        if wrong or (self.soft and opens == closes):
            relation = "above" if row.falls else "below"
            raise ConfigError(
                f"gate.release={closes} must lie {relation} gate.threshold={opens}"
                + (" for a soft gate, which ramps between them." if self.soft else ", or equal it (no hysteresis).")
            )

    def _check_phrases(self) -> None:
        given = (self.phrases,) if isinstance(self.phrases, str) else self.phrases
        phrases = tuple(given) if isinstance(given, (tuple, list)) else ()
        if not phrases or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
            raise ConfigError(f"gate.phrases must be non-empty strings, at least one; got {shown(self.phrases)}.")
        object.__setattr__(self, "phrases", phrases)
