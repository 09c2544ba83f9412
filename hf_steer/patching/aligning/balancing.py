"""What a training step owes the aligners: parameters that train, labels, and the routers' load-balancing loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.errors import AlignerError, PatchError
from hf_steer.families import family_of
from hf_steer.ground.arguments import IGNORED_LABEL
from hf_steer.ground.decoders import reads_encoder
from hf_steer.patching.passes import Pass


def check_trainable(aligners: Any, root: nn.Module) -> None:
    """PatchError where a training step could change nothing; a warning where it would leave the aligners out."""
    if not any(parameter.requires_grad for parameter in root.parameters()):
        raise PatchError(
            "there is nothing to train: all parameters are frozen, the aligners' too. Call "
            "hf_steer.training.train_steering(model) before the optimizer is made."
        )
    if len(aligners) and not any(parameter.requires_grad for parameter in aligners.parameters()):
        warnings.warn(
            "the aligners are frozen while other parameters train; PEFT's get_peft_model freezes them. To train them, "
            "too, call hf_steer.training.train_steering(model) before the optimizer is made.",
            stacklevel=2,
        )


def refuse_unlabelled(aligners: Any, balance: list[Tensor] | None) -> None:
    """AlignerError for a training step whose labels, and with them what belongs to the loss, went another way.

    Args:
        aligners: of the model.
        balance: where the caller takes the load-balancing losses himself; None where he does not.
    """
    if aligners.reads_text:
        raise AlignerError(
            "an aligner that reads the prompt's text needs labels in training: without them it would read the answer, too. "
            "Give labels to the model (label smoothing and compute_loss_func take them away), or call model.eval()."
        )
    weighs = any(planned.config.load_balancing_weight for planned in aligners.plan.aligners)
    learns = any(parameter.requires_grad for parameter in aligners.parameters())
    if weighs and learns and balance is None and not torch.compiler.is_compiling():
        raise AlignerError(
            "the routers' load-balancing loss joins the model's loss, and no labels came to this training step, so there is "
            "none (Trainer's label_smoothing_factor and compute_loss_func take the labels away). Give labels to the model; or "
            "set load_balancing_weight=0 in every AlignerConfig; or add it to your own loss: with "
            "hf_steer.training.collect_balance(model) as balance: ...; loss = loss + balance.loss()."
        )


def trained(aligners: Any) -> Iterator[nn.Parameter]:
    """Parameters of the aligners and of a trained projector."""
    for module in (aligners, *aligners.plan.projectors):
        yield from (parameter for parameter in module.parameters() if parameter.requires_grad)


def balance_of(aligners: Any, current: Pass) -> Tensor:
    """The weighted load-balancing losses of a pass."""
    if not current.balances:
        return torch.zeros(())
    device = current.balances[0].device
    total = torch.stack([value.float().to(device) for value in current.balances]).sum()
    if not total.requires_grad and any(parameter.requires_grad for parameter in aligners.parameters()):
        raise PatchError(
            "the load-balancing loss has no gradient: this transformers runs hooks inside gradient checkpoints. Use "
            "transformers 5.23 or later, no gradient checkpointing in the encoder, or load_balancing_weight=0."
        )
    anatomy = aligners.plan.anatomy
    given = current.given
    counted, labels = (None, None) if given is None else (given.loss_items, given.labels)  # Trainer counts over all its steps
    if counted is None or labels is None or not family_of(anatomy.family).counts_items:
        return total
    # the model's loss is the sum over its own share of the step's items, divided by all of them; so is ours
    labels = labels if anatomy.decoder is None or reads_encoder(anatomy.root) else labels[..., 1:]
    share: Tensor = (labels != IGNORED_LABEL).sum() / counted
    return total * share
