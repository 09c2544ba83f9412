"""The seed's forward passes to the letter, sharing the weights of our modules: what the benchmark compares with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.aligners import HierarchicalRouter, LayerWiseSteering, ProgressiveRouter, SteerMoEAligner


def simple(module: SteerMoEAligner, h: Tensor) -> Tensor:
    weight, bias, vectors = (value.to(h.dtype) for value in (module.router.weight, module.router.bias, module.steering_vectors))
    scores = F.softmax(F.linear(h, weight, bias), dim=-1)
    return h + torch.einsum("bte,ef->btf", scores, vectors)


def hierarchical(module: HierarchicalRouter, h: Tensor) -> Tensor:
    groups, experts, _ = module.local_steering.shape
    weight, bias = module.router.weight.to(h.dtype), module.router.bias.to(h.dtype)
    shared, own = module.global_steering.to(h.dtype), module.local_steering.to(h.dtype)
    global_scores = F.softmax(F.linear(h, weight[:groups], bias[:groups]), dim=-1)
    outputs = []
    for group in range(groups):
        rows = slice(groups + group * experts, groups + (group + 1) * experts)
        local_scores = F.softmax(F.linear(h, weight[rows], bias[rows]), dim=-1)
        outputs.append(torch.einsum("bte,ef->btf", local_scores, own[group]))
    steering = torch.einsum("bte,ef->btf", global_scores, shared)
    local = torch.einsum("btfe,bte->btf", torch.stack(outputs, dim=-1), global_scores)
    return h + steering + local


def progressive(module: ProgressiveRouter, h: Tensor) -> Tensor:
    stages, experts, _ = module.stage_steering.shape
    weight, bias, vectors = (value.to(h.dtype) for value in (module.router.weight, module.router.bias, module.stage_steering))
    seen, accumulated = h, torch.zeros_like(h)
    scores: list[Tensor] = []
    for stage in range(stages):
        rows = slice(stage * experts, (stage + 1) * experts)
        own = weight[rows] if not stage else torch.cat([weight[rows], getattr(module, f"feedback_{stage}").to(h.dtype)], 1)
        scores.append(F.softmax(F.linear(seen, own, bias[rows]), dim=-1))
        accumulated = accumulated + torch.einsum("bte,ef->btf", scores[-1], vectors[stage])
        seen = torch.cat([h, accumulated] if module.feedback == "steering" else [h, *scores], dim=-1)
    return h + accumulated


def layer_wise_routing(module: LayerWiseSteering, h: Tensor) -> list[Tensor]:
    """The whole router at every layer, of which the layer takes its slice."""
    layers, experts, _ = module.steering_vectors.shape
    weight, bias = module.router.weight.to(h.dtype), module.router.bias.to(h.dtype)
    scores = []
    for layer in range(layers):
        logits = F.linear(h, weight, bias).unflatten(-1, (layers, experts))
        scores.append(F.softmax(logits[..., layer, :], dim=-1))
    return scores
