"""When to steer: gates that open while the model is uncertain, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from hf_steer.config.checks import check_choice, check_count, check_flag, check_number, shown
from hf_steer.errors import ConfigError

GateKind = Literal["entropy", "margin", "self_report"]

DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "entropy": MappingProxyType({"threshold": 0.15, "release": 0.1}),
        "margin": MappingProxyType({"threshold": 0.2, "release": 0.4}),
        "self_report": MappingProxyType({"phrases": ("wait", "not sure", "let me check"), "hold_tokens": 16}),
    }
)
"""Kind -> the options that it has, and their values when none are given."""
_ZSCORE: Mapping[str, Any] = MappingProxyType({"threshold": 1.5, "release": 0.5})


@dataclass(frozen=True)
class GateConfig:
    """Steer a row only while it is uncertain. The gate multiplies λ: 1 is open, 0 is unsteered.

    Every row of a batch, and every beam, has a gate of its own. It needs no second generation: a query's gate comes from the
    tokens up to it and from the distribution of the step before. Queries of the prompt, and the first generated token of a
    gate that measures distributions, get `initial`.

    Args:
        kind: `"entropy"`: normalised entropy (0 to 1: entropy over log vocabulary) of the previous step's next-token
            distribution is over `threshold`. `"margin"`: the two likeliest tokens' probabilities differ by less than `threshold`.
            `"self_report"`: a phrase such as "wait" was just said in the thinking text.
        threshold: opens the gate; a share of the largest entropy, or a difference of probabilities, in [0, 1].
        release: closes it again (hysteresis): at most `threshold` for entropy, at least for margin.
        zscore: an entropy gate compares with the row's own running mean: `threshold` and `release` are z-scores, and the
            first four distributions only make the mean.
        soft: instead of 0 or 1, a value between: linear from `release` to `threshold`; for phrases linear from 1 down to 0
            over `hold_tokens`.
        phrases: as they are said, upper or lower case at the start; matched as token sequences that may straddle steps.
        hold_tokens: how many tokens a phrase keeps the gate open, at least 1.
        initial: the gate before anything was measured, in [0, 1].
    """

    kind: GateKind = "entropy"
    threshold: float | None = None
    release: float | None = None
    zscore: bool = False
    soft: bool = False
    phrases: tuple[str, ...] | None = None
    hold_tokens: int | None = None
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_choice("gate.kind", self.kind, tuple(DEFAULTS))
        check_flag("gate.zscore", self.zscore)
        if self.zscore and self.kind != "entropy":
            raise ConfigError(f"gate.zscore is of entropy gates; this one is a {self.kind!r} gate.")
        own = _ZSCORE if self.zscore else DEFAULTS[self.kind]
        foreign = [name for name in ("threshold", "release", "phrases", "hold_tokens") if self._given(name) and name not in own]
        if foreign:
            raise ConfigError(f"a {self.kind!r} gate has no {', '.join(foreign)}; it has {', '.join(own)}.")
        if self._given("threshold") and not self._given("release"):
            object.__setattr__(self, "release", self.threshold)  # no hysteresis that was not asked for
        for name, value in own.items():
            if not self._given(name):
                object.__setattr__(self, name, value)
        check_flag("gate.soft", self.soft)
        object.__setattr__(self, "initial", check_number("gate.initial", self.initial))
        if not 0 <= self.initial <= 1:
            raise ConfigError(f"gate.initial must lie in [0, 1]; got {self.initial}.")
        if self.kind == "self_report":
            self._check_phrases()
        else:
            self._check_thresholds()

    def _given(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _check_thresholds(self) -> None:
        for name in ("threshold", "release"):
            object.__setattr__(self, name, check_number(f"gate.{name}", getattr(self, name)))
            if not self.zscore and not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"gate.{name} of a {self.kind!r} gate must lie in [0, 1]; got {getattr(self, name)}.")
        opens, closes = float(self.threshold or 0), float(self.release or 0)
        wrong = closes < opens if self.kind == "margin" else closes > opens
        if wrong or (self.soft and opens == closes):
            relation = "above" if self.kind == "margin" else "below"
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
        object.__setattr__(self, "hold_tokens", check_count("gate.hold_tokens", self.hold_tokens))
