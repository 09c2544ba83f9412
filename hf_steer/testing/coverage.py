"""What hf_steer can do with one architecture of transformers: a tiny random model of it, steered, against a float oracle."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from hf_steer import families
from hf_steer.config import AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.errors import SteerError
from hf_steer.patching import patch_model, unpatch_model, use_saliency
from hf_steer.saliency import Saliency
from hf_steer.testing.biased import AttentionCalls, Through
from hf_steer.testing.report import CannotShow
from hf_steer.testing.ways import WAYS, Run, Way, whole
from hf_steer.testing.zoo.catalogue import find
from hf_steer.testing.zoo.inputs import TOKENS, Batch, reader, tiny_inputs
from hf_steer.testing.zoo.models import tiny_model
from hf_steer.testing.zoo.prompts import mask_of

STRENGTH, ORACLE = 1.5, "eager"
"""λ, and the implementation of attention in the oracle."""
BAR = 5e-4
"""Greatest deviation from the oracle, of the largest value: another order of summation in a few layers of float32."""
LEAST_EFFECT = 1e-3
"""What steering must change, of the largest value."""
STAGES = (*WAYS, "undo", "unsteered")


class Verdict(NamedTuple):
    """Whether a stage holds; None where this architecture shows nothing of it. `why` not, in words."""

    holds: bool | None
    why: str = ""


@dataclass(frozen=True)
class Coverage:
    """One architecture.

    Attributes:
        model_type: as in its configuration.
        class_name: of the model.
        kind: of the auto mapping: `"causal"`, `"image"`, ...; see `hf_steer.testing.zoo.catalogue.MAPPINGS`.
        builds: a tiny model of it can be made and runs.
        interface: modules that read the prompt call transformers' attention interface.
        patched: hf_steer patches it.
        stages: what came of each of `STAGES`.
        seconds: that it took.
        reason: why it does not build, run, or let itself be patched; or what failed, and of what nothing can be shown.
    """

    model_type: str
    class_name: str
    kind: str
    builds: bool = False
    interface: bool = False
    patched: bool = False
    stages: Mapping[str, bool | None] = field(default_factory=lambda: dict.fromkeys(STAGES))
    seconds: float = 0.0
    reason: str = ""

    @property
    def failed(self) -> tuple[str, ...]:
        """The stages that do not hold."""
        return tuple(name for name, holds in self.stages.items() if holds is False)

    @property
    def covered(self) -> bool:
        """Whether it is patched, equals the oracle, and no stage fails."""
        return self.patched and bool(self.stages["prefill"]) and not self.failed

    def row(self) -> dict[str, Any]:
        """As a line of a table, its stages beside its other fields."""
        fields = asdict(self)
        stages, end = fields.pop("stages"), {name: fields.pop(name) for name in ("seconds", "reason")}
        return {**fields, **stages, **end}


@torch.no_grad()
def cover(model_type: str, class_name: str | None = None, *, implementation: str = ORACLE) -> Coverage:
    """Build an architecture, patch it, and hold it against the oracle.

    Args:
        model_type: as in `config.model_type`.
        class_name: of the model; None for the first that the auto mappings have.
        implementation: of attention, in the steered model; the oracle is eager.

    Raises:
        ConfigError: the installed transformers has no such model.
    """
    began, architecture = time.perf_counter(), find(model_type, class_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that are made small, and of releases that are tried
        found = _cover(Coverage(*architecture), implementation)
    return replace(found, seconds=round(time.perf_counter() - began, 2))


def _cover(blank: Coverage, implementation: str) -> Coverage:
    names = blank.model_type, blank.class_name
    model, why = _attempt(lambda: reader(tiny_model(*names)))
    if model is None:
        return replace(blank, reason=f"does not build: {why}")
    batch = tiny_inputs(model)
    through, reading, why = _reading(model, batch)
    if why:
        return replace(blank, reason=f"does not run: {why}")
    runs = replace(blank, builds=True, interface=through == "interface")
    other = implementation != ORACLE
    steered, why = _attempt(lambda: reader(tiny_model(*names, implementation=implementation)) if other else model)
    if why:
        return replace(runs, reason=f"does not build: {why}")
    case = Case(model, steered, through, reading, [whole(steered, batch), whole(steered, batch)])
    why = case.refusal()
    return replace(runs, reason=why) if why else _held(case, runs)


def _reading(model: Any, batch: Batch) -> tuple[Through | None, list[Any], str]:
    """How the modules that read the prompt attend, and which these are; why it does not run otherwise."""
    for through in get_args(Through):
        with AttentionCalls(through) as calls:
            logits, why = _attempt(lambda: whole(model, batch))
        if logits is None or calls.reading(TOKENS):
            return through, calls.reading(TOKENS), why
    return None, [], ""


def _held(case: Case, runs: Coverage) -> Coverage:
    """All stages of an architecture that is patched."""
    verdicts = {name: case.hold(way) for name, way in WAYS.items()} | case.around()
    told = [f"{name}: {verdict.why}" for name, verdict in verdicts.items() if verdict.why]
    stages = {name: verdicts[name].holds for name in STAGES}
    return replace(runs, patched=True, stages=stages, reason="; ".join([*case.unlike(), *told]))


def _attempt(run: Callable[[], Any]) -> tuple[Any, str]:
    """What a run gives, or why it does not; whatever a model of transformers raises is an answer here."""
    try:
        return run(), ""
    except CannotShow as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


@dataclass(frozen=True)
class Case:
    """One model, and what of it should be steered.

    Attributes:
        model: not patched; the oracle.
        steered: the one that is patched and unpatched; the same one, or of another implementation of attention.
        through: how the attention that reads the prompt is seen; None where there is none.
        reading: the attention modules that read the prompt, as a pass of the model showed.
        plain: logits of two passes of the one that is patched, before it ever was.
    """

    model: Any
    steered: Any
    through: Through | None
    reading: list[Any]
    plain: list[Tensor]

    def refusal(self) -> str:
        """What hf_steer says when asked to patch it; empty where it does."""
        try:
            unpatch_model(patch_model(self.steered, _config()))
        except SteerError as error:
            return f"refused: {error}".replace("\n", " ")
        return ""

    def unlike(self) -> list[str]:
        """Modules that hf_steer steers and that do not read the prompt, or the other way round."""
        ours = {site.name for site in families.resolve(self.steered).layers}
        theirs = {name for name, module in self.model.named_modules() if module in self.reading}
        missed, besides = theirs - _related(theirs, ours), ours - _related(ours, theirs)
        return [
            f"{words} {', '.join(sorted(names)[:3])} ({len(names)} of {len(theirs)})"
            for words, names in (("does not steer", missed), ("steers besides", besides)) if names
        ]  # fmt: skip

    def hold(self, way: Way) -> Verdict:
        """One way to run it, steered, against the oracle."""
        batch = tiny_inputs(self.model, padded=way.padded)
        scores = self._scores(batch)[:, : way.prompt]
        plain, why = _attempt(lambda: way.run(self.model, batch))
        if plain is None and way.instead is not None:
            return self.hold(replace(way, run=way.instead, also=None, instead=None))
        if plain is None:
            return Verdict(None, f"not shown, {why}")
        if self.steered is not self.model and apart(way.run(self.steered, batch), plain) > BAR:
            return Verdict(None, f"not shown, the model itself is not what it is in {ORACLE}")
        expected, why = _attempt(lambda: self._biased(way.run, batch, scores))
        if expected is None:
            return Verdict(None, f"no oracle, {why}")
        if apart(expected, plain) < LEAST_EFFECT:
            return Verdict(None, "not shown, the oracle changes nothing")
        found, why = _attempt(lambda: self._steered(way.run, batch, scores))
        if found is None:
            return Verdict(False, why)
        error = apart(found, expected)
        if error > BAR:
            return Verdict(False, f"{error:.2g} from the oracle")
        return Verdict(True) if way.also is None else self._hold_also(way.also, batch, scores, plain, found)

    def _hold_also(self, run: Run, batch: Batch, scores: Tensor, plain: Tensor, found: Tensor) -> Verdict:
        """What was found against the oracle run in another way, with room for what the model itself makes of the other way."""
        own = apart(plain, run(self.model, batch))
        error = apart(found, self._biased(run, batch, scores))
        holds = error <= BAR + 2 * own
        return Verdict(holds, "" if holds else f"{error:.2g} from one pass, the model itself {own:.2g}")

    def around(self) -> dict[str, Verdict]:
        """A patched model that is told nothing or steered by nothing, and one that is unpatched again."""
        batch = tiny_inputs(self.model)
        plain = self.plain[0]
        if not torch.equal(plain, self.plain[1]):
            return dict.fromkeys(("undo", "unsteered"), Verdict(None, "not shown, two passes of the model itself differ"))
        silent, why = _attempt(lambda: self._patched(lambda: whole(self.steered, batch)))
        idle, why_idle = _attempt(lambda: self._steered(whole, batch, self._scores(batch), strength=0.0))
        same = all(logits is not None and torch.equal(logits, plain) for logits in (silent, idle))
        undone = torch.equal(whole(self.steered, batch), plain)
        return {
            "undo": Verdict(undone, "" if undone else "other logits than before it was patched"),
            "unsteered": Verdict(same, "" if same else why or why_idle or "other logits than unpatched"),
        }

    def _scores(self, batch: Batch) -> Tensor:
        mask = mask_of(self.model, batch)
        return torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)) * mask

    def _biased(self, run: Run, batch: Batch, scores: Tensor) -> Tensor:
        with AttentionCalls(self.through or "interface", self.reading, STRENGTH * scores):
            return run(self.model, batch)

    def _steered(self, run: Run, batch: Batch, scores: Tensor, strength: float = STRENGTH) -> Tensor:
        def told() -> Tensor:
            with use_saliency(self.steered, Saliency.from_tokens(scores)):
                return run(self.steered, batch)

        return self._patched(told, strength)

    def _patched(self, run: Callable[[], Tensor], strength: float = STRENGTH) -> Tensor:
        patch_model(self.steered, _config(strength))
        try:
            return run()
        finally:
            unpatch_model(self.steered)


def _config(strength: float = STRENGTH) -> SteerConfig:
    saliency = SaliencyConfig(source=None, normalize="none")
    return SteerConfig(attention=AttentionConfig(strength=strength, saliency=saliency, queries="all"))


def _related(names: set[str], others: set[str]) -> set[str]:
    """Those of which another is the same module, one inside it, or one around it."""
    return {one for one in names for other in others if f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")}


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest deviation, of the largest value; infinite for tensors of different shapes."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
