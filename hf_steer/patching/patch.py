"""patch_model and unpatch_model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal, TypeVar

from torch import nn

from hf_steer.config import AttentionConfig, GateConfig, SaliencyConfig, SteerConfig
from hf_steer.config.checks import Heads, Strength
from hf_steer.errors import ConfigError, PatchError
from hf_steer.ground.implementations import implementation_of, is_ours
from hf_steer.ground.survey import survey
from hf_steer.patching.edits import SetTrainable
from hf_steer.patching.gaze.masking import takes_bias_by_mask
from hf_steer.patching.handle import Steering, note_in_force, owner_of
from hf_steer.patching.plan import make_plan
from hf_steer.patching.planned import Plan
from hf_steer.patching.scopes import STEERING, find_steering, steering_of
from hf_steer.patching.short import whole_config
from hf_steer.patching.unchanged import refuse_running
from hf_steer.patching.weights import adapter_parameters

Model = TypeVar("Model")


def patch_model(
    model: Model,
    config: SteerConfig | AttentionConfig | None = None,
    *,
    heads: Heads | None = None,
    strength: Strength | Literal["auto", "trainable"] | None = None,
    saliency: SaliencyConfig | str | None = None,
    queries: str | None = None,
    gate: GateConfig | str | None = None,
    share: float | None = None,
    freeze_base: bool | None = None,
    tokenizer: Any = None,
) -> Model:
    """Patch a live model in place: by a configuration, or, for one gaze, by saying it short.

    `patch_model(model, heads={3: (0, 5)}, strength=4.0)` is `patch_model(model, SteerConfig(attention=AttentionConfig(...)))`.

    Args:
        model: a transformers model of a known family, on any device, in any dtype.
        config: what to steer; an `AttentionConfig` alone is a `SteerConfig` without aligners.
        heads: instead of a configuration: as in `AttentionConfig`, and so are the next five.
        strength: likewise.
        saliency: likewise; where it is not given, the model's own eyes, or only what is said where it has none that can be read.
        queries: likewise.
        gate: likewise.
        share: likewise.
        freeze_base: train nothing but the aligners and learned strengths (and the projector, with `train_projector`); PEFT's
            adapters are left as they are. None freezes when the configuration has something to train. Unpatching takes it back.
        tokenizer: of the model, or its processor: reads the think tags and phrases of `queries`, `schedule` and `gate`, where
            there are any. None loads it from where the model came from.

    Returns:
        The same object. Its layers without steered heads run the code that they ran before, and so do all of them when
        nothing says where to look. A model that has aligners and no gaze takes one, from a configuration with the same aligners or
        with none; the aligners keep what they have learned.

    Raises:
        PatchError: not a model that can be patched; already patched with another configuration (but for a gaze that is added).
        GroundError: this version of transformers, or this model, lacks something that the steering relies on.
        ConfigError: the configuration does not fit this model, or freezing would leave nothing to train. In every case the
            model is as it was.
    """
    _refuse_nested(model)
    said = {"heads": heads, "strength": strength, "saliency": saliency, "queries": queries, "gate": gate, "share": share}
    plan = make_plan(model, whole_config(model, config, said), tokenizer)
    if freeze_base and not plan.trains:
        raise ConfigError(
            "freeze_base=True would leave nothing to train: the configuration has no aligners, no strength='trainable', and "
            "train_projector=False. Add an AlignerConfig, or leave freeze_base out."
        )
    present = model._modules.get(STEERING)  # type: ignore[attr-defined]
    if present is None:
        _put_in(_surveyed(plan), freeze=freeze_base is not False)
    elif present.plan.config != plan.config:
        both = None if freeze_base is not None else present.plan.config.with_gaze_of(plan.config)
        if both is None:
            raise PatchError(
                "this model is patched with another configuration; call hf_steer.unpatch_model(model) first, "
                "or hf_steer.get_steer_status(model) to see it."
            )
        present.add_gaze(_surveyed(make_plan(model, both, tokenizer)))
    return model


def _surveyed(plan: Plan) -> Plan:
    """The plan, where nothing runs the model meanwhile, and all that it relies on is there."""
    refuse_running(plan.anatomy.root, "patch")
    survey(plan)
    return plan


def _put_in(plan: Plan, *, freeze: bool) -> None:
    """All changes of a surveyed plan, or none of them."""
    _refuse_shared(plan)
    steering = Steering(plan)
    steering.gaze.functions.register()
    with ExitStack() as edits:
        if plan.trains:
            edits.enter_context(SetTrainable(_trainable(plan, freeze=freeze)))
        for edit in steering.edits():
            edits.enter_context(edit)
        steering.undo = edits.pop_all()
    note_in_force(steering)


def unpatch_model(model: Model) -> Model:
    """Take back every change of `patch_model`: the same config objects, no hooks, no submodule, bit-equal outputs.

    Returns:
        The same object.

    Raises:
        PatchError: the model is not patched.
    """
    steering = steering_of(model)
    refuse_running(steering.plan.anatomy.root, "unpatch")
    steering.undo.close()
    steering.release()
    return model


def _refuse_nested(model: Any) -> None:
    """PatchError for a model inside a patched one, or around one: both would steer the same layers."""
    if not isinstance(model, nn.Module) or STEERING in model._modules:
        return
    name, inner, outer = type(model).__name__, find_steering(model), owner_of(model)
    if inner is not None:
        held = type(inner.plan.anatomy.root).__name__
        raise PatchError(
            f"this {name} holds a {held} that is patched already. Patch only one of the two, or take its steering back first: "
            "hf_steer.unpatch_model(inner_model)."
        )
    if outer is not None:
        raise PatchError(
            f"this {name} is a part of a {outer} that is patched already; its layers are steered from there. Patch the whole "
            "model, or take its steering back first: hf_steer.unpatch_model(whole_model)."
        )


def _refuse_shared(plan: Plan) -> None:
    """PatchError for layers that another patched model holds, too."""
    shared = [
        site.name
        for site in plan.anatomy.layers
        if (takes_bias_by_mask(site.module) if site.takes else is_ours(implementation_of(site.module.config)))
    ]
    if shared:
        raise PatchError(
            f"{shared[0]} is steered already, by another patched model that shares it, and layers can follow one configuration "
            "only. Take that one's steering back first: hf_steer.unpatch_model(other_model)."
        )


def print_trainable_parameters(model: Any) -> None:
    """Print how many parameters the steering has, a trained projector included, and how many of the model are trainable."""
    steering = steering_of(model)
    modules = (steering, *steering.plan.projectors)
    own = sum(parameter.numel() for module in modules for parameter in module.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"steering: {own:,} parameters | trainable: {trainable:,} of {total:,} ({100 * trainable / max(total, 1):.4f} %)")


def _trainable(plan: Plan, *, freeze: bool) -> Iterator[tuple[nn.Parameter, bool]]:
    """Which of the base's parameters train: its projector when asked; the others as they do now, or not."""
    projector = {id(parameter) for module in plan.projectors for parameter in module.parameters()}
    kept = projector | adapter_parameters(plan.anatomy.root)
    for parameter in plan.anatomy.root.parameters():
        if id(parameter) in projector and parameter.is_floating_point():
            yield parameter, True
        elif freeze and id(parameter) not in kept:
            yield parameter, False
