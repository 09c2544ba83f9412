"""How each contender runs a decoder layer or a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_steer.attention import SteeredCall, head_bias
from hf_steer.config import AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.evidence.bench.decoder_stage import DecoderStage
from hf_steer.evidence.bench.edited import EDITED, register_edited
from hf_steer.evidence.bench.scores import STRENGTH, dense_bias
from hf_steer.evidence.bench.timing import Call
from hf_steer.ground.arguments import named
from hf_steer.ground.attention_call import options_of
from hf_steer.patching import disable_steering, use_saliency, use_strength
from hf_steer.saliency import Saliency
from hf_steer.values import TokenScores


def plain(stage: DecoderStage) -> Call:
    """The model as it is."""
    return stage.call(stage.model)


def steered(stage: DecoderStage, *, backend: str = "auto") -> Call:
    """Ours: every head of every layer."""
    model = stage.twin(config=_config(backend))
    if stage.cell.level == "layer":
        return stage.call(model, lambda: {"hf_steer": SteeredCall({0: _bias(stage)}, backend)})
    saliency = _saliency(stage)
    return stage.call(model, contexts=lambda: (use_saliency(model, saliency),), prime=True)


def disabled(stage: DecoderStage) -> Call:
    """Patched, and off."""
    model = stage.twin(config=_config("auto"))
    return stage.call(model, contexts=lambda: (disable_steering(model),))


def at_zero(stage: DecoderStage) -> Call:
    """Patched, and every strength 0."""
    model = stage.twin(config=_config("auto"))
    if stage.cell.level == "layer":
        return stage.call(model, lambda: {"hf_steer": SteeredCall()})
    saliency = _saliency(stage)
    return stage.call(model, contexts=lambda: (use_saliency(model, saliency), use_strength(model, 0.0)), prime=True)


def dense_mask(stage: DecoderStage, *, flat: bool = False, steered: bool = True) -> Call:
    """A 4-D float mask per head, which transformers hands on to sdpa as it is."""
    return stage.call(stage.model, lambda: named(mask=full_mask(stage, flat=flat, steered=steered)))


def position_bias(stage: DecoderStage) -> Call:
    """sdpa's own argument, handed through the model."""
    return stage.call(stage.model, lambda: options_of(added=key_bias(stage)))


def edited(stage: DecoderStage) -> Call:
    """Eager attention with edited logits."""
    register_edited()
    cell = stage.cell

    def options() -> Mapping[str, Any]:
        bias = {"edited_bias": key_bias(stage)}
        if cell.level != "layer" or cell.queries == 1:
            return bias
        return bias | named(mask=dense_bias(torch.zeros(1, cell.keys, device=cell.device), 1, cell.queries, stage.dtype))

    return stage.call(stage.twin(EDITED), options)


def exact(stage: DecoderStage, *, steered: bool, flat: bool = False) -> tuple[Tensor, ...]:
    """What a call should give: the same weights in float64, with a dense mask."""
    return dense_mask(stage.wide(), flat=flat, steered=steered).result()


def full_mask(stage: DecoderStage, *, flat: bool = False, steered: bool = True) -> Tensor:
    """`(batch, heads, queries, keys)`."""
    bias = stage.scores(flat=flat) * (STRENGTH if steered else 0.0)
    return dense_bias(bias, stage.cell.shape.heads, stage.cell.queries, stage.dtype)


def key_bias(stage: DecoderStage) -> Tensor:
    """`(batch, heads, 1, keys)`."""
    bias = (STRENGTH * stage.scores()).to(stage.dtype)[:, None, None]
    return bias.expand(-1, stage.cell.shape.heads, -1, -1).contiguous()


def _config(backend: str) -> SteerConfig:
    saliency = SaliencyConfig(source=None, normalize="none")
    return SteerConfig(attention=AttentionConfig(strength=STRENGTH, saliency=saliency, backend=backend, queries="all"))


def _saliency(stage: DecoderStage) -> Saliency:
    return Saliency.from_tokens(stage.scores()[:, : stage.cell.tokens])


def _bias(stage: DecoderStage) -> Any:
    scores = stage.scores()
    strength = torch.full((stage.cell.shape.heads,), STRENGTH, device=scores.device)
    return head_bias(TokenScores(scores, torch.where(scores > 0, 0, -1)), strength, None, None)
