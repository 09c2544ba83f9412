"""What a patched model tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_steer.config import TRAINABLE, SteerConfig
from hf_steer.patching.planned import Plan
from hf_steer.patching.scopes import Scope, find_steering, scope_of


@dataclass(frozen=True)
class SteerStatus:
    """What steers a model.

    Attributes:
        patched: whether `patch_model` has been applied.
        enabled: whether it is on for this thread (see `disable_steering`).
        family: the model's row in the families table; None when not patched.
        heads: layer -> query heads with a strength that is not 0.
        aligners: what is inserted where, such as `"progressive at image output"`.
        saliency: `"user"` inside `use_saliency`, else the configured source; None when nothing supplies any.
        config: the configuration in force.
        steers: whether a call made here would be steered.
        why: why not; None where it would.
    """

    patched: bool
    enabled: bool = False
    family: str | None = None
    heads: dict[int, tuple[int, ...]] | None = None
    aligners: tuple[str, ...] = ()
    saliency: str | None = None
    config: SteerConfig | None = None
    steers: bool = False
    why: str | None = None

    def __str__(self) -> str:
        if not self.patched:
            return "not patched: the model runs as it was loaded; see hf_steer.patch_model"
        heads = {layer: own for layer, own in (self.heads or {}).items() if own}
        number = sum(map(len, heads.values()))
        parts = []
        if number:
            told: dict[str | None, str] = {"user": "where the user says", None: "only where they are told"}
            looks = told.get(self.saliency, f"where {self.saliency} points")
            layers = ", ".join(map(str, heads))
            parts.append(f"{number} heads (layer{'s' * (len(heads) > 1)} {layers}) look {looks}")
        if self.aligners:
            parts.append(f"aligners: {', '.join(self.aligners)}")
        state = "steers" if self.steers else f"does not steer here: {self.why}"
        return f"{self.family}, patched, {state}" + "".join(f"\n  {part}" for part in parts)


def get_steer_status(model: Any) -> SteerStatus:
    """What steers this model now, in this thread; also for a model that is not patched. `print` it to read it."""
    steering = find_steering(model)
    if steering is None:
        return SteerStatus(patched=False, why="the model is not patched; see hf_steer.patch_model")
    plan: Plan = steering.plan
    scope = scope_of(steering)
    enabled, statement = not scope.off, scope.saliency
    attention = plan.config.attention
    why = _why_not(steering, scope)
    return SteerStatus(
        patched=True,
        enabled=enabled,
        family=plan.anatomy.family,
        heads={
            layer: tuple(head for head, value in enumerate(values) if value) for layer, values in plan.strengths.items()
        },
        aligners=tuple(f"{a.kind} at {a.modality} {a.placement}" for a in plan.config.aligners),
        saliency="user" if statement is not None else attention.saliency.source if attention is not None else None,
        config=plan.config,
        steers=why is None,
        why=why,
    )


def _why_not(steering: Any, scope: Scope) -> str | None:
    """Why a call made here would not be steered; None where it would."""
    plan: Plan = steering.plan
    attention = plan.config.attention
    if scope.off:
        return "it is off in this thread, inside disable_steering"
    if plan.aligners:
        return None
    if attention is None:
        return "its configuration has neither attention nor aligners"
    if not plan.strengths:
        return "all strengths are 0"
    in_force = scope.strengths
    if in_force is not None and not any(any(values) for values in in_force.values()):
        return "use_strength sets all strengths to 0 here"
    if attention.strength == TRAINABLE and not any(bool(own.any()) for own in steering.learned.parameters()):
        return "its strengths are trainable and still 0"
    if scope.saliency is None and not plan.sees:
        return "nothing says where to look: it has no source, and no use_saliency block is open here; or give the call saliency="
    return None
