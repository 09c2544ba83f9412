"""patch_model, unpatch_model, and what a patched model tells about itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_steer.attention import recording_attention, registered_name, steered_attention
from hf_steer.config import SteerConfig
from hf_steer.errors import ConfigError, PatchError
from hf_steer.patching.context import STEERING, find_steering, statement_for, steering_of
from hf_steer.patching.edits import SetTrainable
from hf_steer.patching.flash import flash_by_name
from hf_steer.patching.handle import Steering
from hf_steer.patching.plan import implementation_of, make_plan
from hf_steer.patching.weights import adapter_parameters
from hf_steer.values import Plan, Site

Model = TypeVar("Model")


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
    """

    patched: bool
    enabled: bool = False
    family: str | None = None
    heads: dict[int, tuple[int, ...]] | None = None
    aligners: tuple[str, ...] = ()
    saliency: str | None = None
    config: SteerConfig | None = None


def patch_model(model: Model, config: SteerConfig, *, freeze_base: bool | None = None, tokenizer: Any = None) -> Model:
    """Patch a live model in place.

    Args:
        model: a transformers model of a known family, on any device, in any dtype.
        config: what to steer.
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
        ConfigError: the configuration does not fit this model, or freezing would leave nothing to train. In every case the
            model is as it was.
    """
    plan = make_plan(model, config, tokenizer)
    trains = plan.trains
    if freeze_base and not trains:
        raise ConfigError(
            "freeze_base=True would leave nothing to train: the configuration has no aligners, no strength='trainable', and "
            "train_projector=False. Add an AlignerConfig, or leave freeze_base out."
        )
    present = model._modules.get(STEERING)  # type: ignore[attr-defined]
    if present is not None:
        if present.plan.config == plan.config:
            return model
        both = present.plan.config.with_gaze_of(plan.config)
        if both is not None and freeze_base is None:
            plan = make_plan(model, both, tokenizer)
            _register_functions(plan)
            present.add_gaze(plan)
            return model
        raise PatchError(
            "this model is patched with another configuration; call hf_steer.unpatch_model(model) first, "
            "or hf_steer.get_steer_status(model) to see it."
        )
    _register_functions(plan)
    steering = Steering(plan)
    with ExitStack() as edits:
        if trains:
            edits.enter_context(SetTrainable(_trainable(plan, freeze=freeze_base is not False)))
        for edit in steering.edits():
            edits.enter_context(edit)
        steering.undo = edits.pop_all()
    return model


def unpatch_model(model: Model) -> Model:
    """Take back every change of `patch_model`: the same config objects, no hooks, no submodule, bit-equal outputs.

    Returns:
        The same object.

    Raises:
        PatchError: the model is not patched.
    """
    steering_of(model).undo.close()
    return model


def get_steer_status(model: Any) -> SteerStatus:
    """What steers this model now, in this thread; also for a model that is not patched."""
    steering = find_steering(model)
    if steering is None:
        return SteerStatus(patched=False)
    plan: Plan = steering.plan
    enabled, statement = statement_for(steering)
    attention = plan.config.attention
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


def _register_functions(plan: Plan) -> None:
    """Make our attention functions known under names of their own; a registry entry changes no model."""
    anatomy = plan.anatomy
    gaze = [site for site in anatomy.layers if site.index in plan.strengths or site.index in plan.readers]
    if gaze:
        implementation = implementation_of(anatomy.decoder.config)
        function = partial(steered_attention, inner=_inner(gaze[0], implementation), implementation=implementation)
        ALL_ATTENTION_FUNCTIONS.register(registered_name(implementation, "gaze", anatomy.family), function)
    if plan.eyes:
        implementation = implementation_of(anatomy.tower.config)
        function = partial(recording_attention, inner=_inner(plan.eyes[0], implementation))
        ALL_ATTENTION_FUNCTIONS.register(registered_name(implementation, "eyes", anatomy.tower.config.model_type), function)


def _inner(site: Site, implementation: str) -> Any:
    """The function that an attention module calls now; eager's lies in the model's own file."""
    if implementation == "eager":
        return sys.modules[type(site.module).__module__].eager_attention_forward
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    if "flash" in implementation:
        return partial(flash_by_name, flash=function)
    return function
