"""What models of transformers give back: outputs by field or as tuples, and what we read of them or replace in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

RECORD = "hf_steer"
"""Where a tower's output carries what was recorded of it."""


def logits_in(output: Any) -> Tensor:
    """`(rows, some queries, vocabulary)`."""
    if isinstance(output, ModelOutput):
        return output["logits"]  # type: ignore[no-any-return]
    return next(value for value in output if isinstance(value, Tensor) and value.ndim == 3)


def with_added_loss(output: Any, extra: Tensor) -> Any:
    """The same output with something added to its loss."""
    if isinstance(output, ModelOutput):
        loss = output["loss"]
        return type(output)(**{**output, "loss": loss + extra.to(loss)})
    return (output[0] + extra.to(output[0]), *output[1:])


def with_features(output: Any, features: Tensor) -> Any:
    """An encoder's output with other features."""
    if isinstance(output, Tensor):
        return features
    if not isinstance(output, ModelOutput):
        return (features, *output[1:])
    changed: dict[str, Any] = {"last_hidden_state": features}
    states = output.get("hidden_states")
    if states and states[-1] is output["last_hidden_state"]:
        changed["hidden_states"] = (*states[:-1], features)
    return type(output)(**{**output, **changed})


def features_in(output: Any) -> Tensor:
    """What an encoder hands on."""
    if isinstance(output, Tensor):
        return output
    return output["last_hidden_state"] if isinstance(output, ModelOutput) else output[0]  # type: ignore[no-any-return]


def pooled_in(output: Any) -> Any:
    """Features of pictures as the language model gets them: one tensor per picture, or one for all videos."""
    return output.pooler_output


def put_record(output: Any, record: Any) -> None:
    """Leave what was recorded on the output of a tower, which travels to the decoder even when the caller encodes first."""
    if isinstance(output, ModelOutput):
        setattr(output, RECORD, record)


def records_in(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Modality -> what was left on its output, where something was."""
    return {modality: getattr(output, RECORD) for modality, output in outputs.items() if hasattr(output, RECORD)}
