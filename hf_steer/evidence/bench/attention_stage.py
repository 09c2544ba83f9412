"""Level "attention": one attention function on random queries, keys and values that lie in memory as a model's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.attention import SteeredCall, attend_for, fit_bias, head_bias
from hf_steer.evidence.bench.cells import Cell
from hf_steer.evidence.bench.edited import edited_attention
from hf_steer.evidence.bench.scores import STRENGTH, causal, dense_bias, image_scores
from hf_steer.evidence.bench.timing import Call
from hf_steer.ground.attention_call import options_of, steered_function
from hf_steer.ground.implementations import function_of
from hf_steer.values import HeadBias, TokenScores

_ROWS = 256
"""Queries of a prompt that are verified, spread evenly from the first to the last."""


class Site(nn.Module):
    """What an attention function reads of the module that calls it."""

    def __init__(self, groups: int, training: bool) -> None:
        super().__init__()
        self.is_causal, self.layer_idx, self.num_key_value_groups = True, 0, groups
        self.train(training)


class AttentionStage:
    """Inputs of one cell, and the calls on them."""

    def __init__(self, cell: Cell, *, seed: int = 0) -> None:
        self.cell, shape = cell, cell.shape
        generator = torch.Generator(cell.device).manual_seed(seed)
        training = cell.phase == "training"

        def draw(tokens: int, heads: int) -> Tensor:
            numbers = torch.randn(
                cell.batch, tokens, heads, shape.head_dim, generator=generator, device=cell.device, dtype=cell.torch_dtype
            )
            return numbers.transpose(1, 2).requires_grad_(training)

        self.query = draw(cell.queries, shape.heads)
        self.key, self.value = (draw(cell.keys, shape.key_value_heads) for _ in range(2))
        self.gradient = draw(cell.queries, shape.heads).detach().transpose(1, 2) if training else None
        self.site = Site(shape.heads // shape.key_value_heads, training)
        self.scale = shape.head_dim**-0.5
        self.sdpa = function_of("sdpa", torch.nn.Module)

    def scores(self, *, flat: bool = False) -> Tensor:
        """`(batch, keys)`."""
        return image_scores(self.cell.batch, self.cell.keys, device=self.cell.device, flat=flat)

    def bias(self) -> HeadBias:
        """As a patched model makes it for the layer."""
        scores = self.scores()
        strength = torch.full((self.cell.shape.heads,), STRENGTH, device=scores.device)
        return head_bias(TokenScores(scores, torch.where(scores > 0, 0, -1)), strength, None, None)

    def call(self, attend: Callable[..., Any], mask: Tensor | None = None, *, held: int = 0, **options: Any) -> Call:
        """A call of an attention function, in training with its backward pass."""
        tensors = (self.query, self.key, self.value)
        options.update(options_of(scale=self.scale))

        def run() -> tuple[Tensor, ...]:
            output, _ = attend(self.site, *tensors, mask, **options)
            if self.gradient is None:
                return (output,)
            return (output, *torch.autograd.grad(output, tensors, self.gradient))

        return Call(run, torch.enable_grad if self.gradient is not None else torch.no_grad, held)

    def outcome(self, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The part of a result that is verified."""
        return result if self.gradient is not None else (result[0][:, self._rows()],)

    def exact(self, *, steered: bool, flat: bool = False) -> tuple[Tensor, ...]:
        """The outcome in float64 by the dense formula, row by row of the batch."""
        given = (self.query, self.key, self.value)
        tensors = tuple(tensor.detach().double().requires_grad_(self.gradient is not None) for tensor in given)
        rows, groups = self._rows(), self.site.num_key_value_groups
        scores = self.scores(flat=flat).double() * (STRENGTH if steered else 0.0)
        allowed = causal(self.cell.queries, self.cell.keys, self.cell.device)[rows]
        outputs = []
        with torch.set_grad_enabled(self.gradient is not None):
            for query, key, value, bias in zip(*tensors, scores, strict=True):
                wide_key, wide_value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
                logits = query[:, rows] @ wide_key.transpose(1, 2) * self.scale + bias
                weights = torch.softmax(logits.masked_fill(~allowed, -torch.inf), dim=-1)
                outputs.append((weights @ wide_value).transpose(0, 1))
            output = torch.stack(outputs)
            if self.gradient is None:
                return (output,)
            return (output.detach(), *torch.autograd.grad(output, tensors, self.gradient.double()))

    def _rows(self) -> Tensor:
        count = self.cell.queries if self.gradient is not None else min(_ROWS, self.cell.queries)
        return torch.linspace(0, self.cell.queries - 1, count, device=self.cell.device).round().long()


def plain(stage: AttentionStage) -> Call:
    """transformers' sdpa alone."""
    return stage.call(stage.sdpa)


def steered(stage: AttentionStage, *, backend: str = "auto") -> Call:
    """Ours, the bias ready: a model makes it once per prompt."""
    return stage.call(_ours(stage), hf_steer=SteeredCall({0: stage.bias()}, backend))


def disabled(stage: AttentionStage) -> Call:
    """Ours inside `disable_steering`: nothing rides along."""
    return stage.call(_ours(stage))


def at_zero(stage: AttentionStage) -> Call:
    """Ours at strength 0: what rides along has no bias for the layer."""
    return stage.call(_ours(stage), hf_steer=SteeredCall())


def _ours(stage: AttentionStage) -> Callable[..., Any]:
    """What a patched module calls; without the rest of a model nothing can be lost on the way to it."""
    return steered_function(attend_for, fit_bias, lambda module, options: None, inner=stage.sdpa, implementation="sdpa")


def dense_mask(stage: AttentionStage) -> Call:
    """sdpa with a float mask per head, ready."""
    cell = stage.cell
    mask = dense_bias(STRENGTH * stage.scores(), cell.shape.heads, cell.queries, cell.torch_dtype)
    return stage.call(stage.sdpa, mask, held=mask.nbytes)


def position_bias(stage: AttentionStage) -> Call:
    """sdpa with its own argument for a bias, one number per head and key."""
    bias = (STRENGTH * stage.scores()).to(stage.cell.torch_dtype)[:, None, None].expand(-1, stage.cell.shape.heads, -1, -1)
    return stage.call(stage.sdpa, **options_of(added=bias.contiguous()))


def edited(stage: AttentionStage) -> Call:
    """Eager attention whose logits are edited, with the causal mask that eager attention needs."""
    cell = stage.cell
    bias = (STRENGTH * stage.scores()).to(cell.torch_dtype)[:, None, None].expand(-1, cell.shape.heads, -1, -1)
    mask = None
    if cell.queries > 1:
        mask = dense_bias(torch.zeros(1, cell.keys, device=cell.device), 1, cell.queries, cell.torch_dtype)
    held = 0 if mask is None else mask.nbytes
    return stage.call(edited_attention, mask, held=held, edited_bias=bias.contiguous())
