"""Glue for those who train aligners: with Trainer, with accelerate, with PEFT, or with a loop of their own.

A patched model trains in a plain `Trainer` as it is; what is here logs its routing and covers the cases that need a hand.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from hf_steer.errors import PatchError
from hf_steer.io import load_steering, save_steering
from hf_steer.patching.aligning.listening import Balance, Listener, collect_balance, record_routing
from hf_steer.patching.scopes import find_steering, steering_of
from hf_steer.patching.weights import trains_alone

__all__ = [
    "Balance",
    "Listener",
    "RoutingCallback",
    "checkpoint_with",
    "collect_balance",
    "log_routing",
    "record_routing",
    "train_steering",
]


def train_steering(model: Any) -> None:
    """Let the aligners of a patched model train, and a projector that is trained with them.

    `get_peft_model` and transformers' `add_adapter` freeze all that is not their own; call this after them, before the optimizer is
    made. Whatever saves the adapter saves the steering with it, and loading or resuming finds it there.

    Args:
        model: a patched model, inside PEFT's wrapper or not.

    Raises:
        PatchError: the model is not patched, or its steering has no parameters.
    """
    steering = steering_of(model)
    parameters = [p for module in (steering, *steering.plan.projectors) for p in module.parameters()]
    if not parameters:
        raise PatchError("this steering has nothing to train: no aligners, and train_projector=False. See AlignerConfig.")
    for parameter in parameters:
        parameter.requires_grad_(True)


def log_routing(trainer: Any) -> None:
    """Log expert usage, load and routing entropy to whatever the trainer reports to, whenever it logs.

    Names are `routing/<modality>.<placement>/<router>/<statistic>`, with the expert's number after usage and load.

    Args:
        trainer: a transformers Trainer, whose model is patched.

    Raises:
        PatchError: the model is not patched.
    """
    steering_of(trainer.model)
    trainer.add_callback(RoutingCallback(trainer))


class RoutingCallback(TrainerCallback):
    """What `log_routing` adds: listens while the trainer trains."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.open = ExitStack()
        self.listener: Listener | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.open.close()
        self.listener = self.open.enter_context(record_routing(self.trainer.model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_when_due(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_when_due(control)

    def _log_when_due(self, control: Any) -> None:
        if control.should_log and self.listener is not None:
            logged: dict[str, float] = {}
            for name, value in self.listener.read().items():
                values = enumerate(value) if isinstance(value, list) else [("", value)]
                logged |= {f"routing/{name}/{number}".rstrip("/"): figure for number, figure in values}
            if logged:
                self.trainer.log(logged)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.open.close()


def checkpoint_with(accelerator: Any) -> None:
    """Let `accelerator.save_state` and `load_state` write and read the steering alone of models that train nothing else.

    Args:
        accelerator: an accelerate Accelerator; models that are not patched, or train other parameters, too, are saved as ever.
    """

    def alone(model: Any) -> bool:
        steering = find_steering(model)
        return steering is not None and trains_alone(steering)

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        for index in reversed(range(len(models))):
            if alone(models[index]):
                save_steering(models[index], os.path.join(output_dir, f"steering_{index}"))
                if weights:
                    weights.pop(index)

    def load(models: list[Any], input_dir: str) -> None:
        for index in reversed(range(len(models))):
            if alone(models[index]):
                load_steering(models.pop(index), os.path.join(input_dir, f"steering_{index}"))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
