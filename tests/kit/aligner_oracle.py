"""The seed's formulas, to the letter, in plain fp64 loops over tokens, experts and heads."""

from __future__ import annotations

import math

import torch


def softmax(values, temperature=1.0, top_k=None):
    values = [value.item() / temperature for value in values]
    kept = sorted(range(len(values)), key=lambda index: -values[index])[: top_k or len(values)]
    total = sum(math.exp(values[index]) for index in kept)
    return [math.exp(value) / total if index in kept else 0.0 for index, value in enumerate(values)]


def per_token(features, function):
    flat = features.double().reshape(-1, features.shape[-1])
    return torch.stack([function(token) for token in flat]).reshape(*features.shape[:-1], -1)


def routed(token, weight, bias, vectors, **how):
    scores = softmax(weight.double() @ token + bias.double(), **how)
    return scores, sum(score * vector.double() for score, vector in zip(scores, vectors, strict=True))


def simple(module, features, **how):
    router = module.router
    return per_token(features, lambda h: h + routed(h, router.weight, router.bias, module.steering_vectors, **how)[1])


def hierarchical(module, features, **how):
    groups, experts, _ = module.local_steering.shape
    weight, bias = module.router.weight, module.router.bias

    def steer(h):
        total = h.clone()
        g, from_global = routed(h, weight[:groups], bias[:groups], module.global_steering, temperature=how.get("temperature", 1.0))
        total = total + from_global
        for group in range(groups):
            rows = slice(groups + group * experts, groups + (group + 1) * experts)
            _, local = routed(h, weight[rows], bias[rows], module.local_steering[group], **how)
            total = total + g[group] * local
        return total

    return per_token(features, steer)


def progressive(module, features, **how):
    stages, experts, _ = module.stage_steering.shape

    def steer(h):
        accumulated, earlier = torch.zeros_like(h), []
        for stage in range(stages):
            rows = slice(stage * experts, (stage + 1) * experts)
            seen = torch.tensor(earlier, dtype=torch.double) if module.feedback == "scores" else accumulated
            weight, fed = module.router.weight[rows].double(), h
            if stage:  # what the seed concatenates
                weight = torch.cat([weight, getattr(module, f"feedback_{stage}").double()], 1)
                fed = torch.cat([h, seen])
            scores, steering = routed(fed, weight, module.router.bias[rows], module.stage_steering[stage], **how)
            accumulated = accumulated + steering
            earlier += scores
        return h + accumulated

    return per_token(features, steer)


def layer_wise(module, features, layer, **how):
    layers, experts, _ = module.steering_vectors.shape

    def steer(h):
        logits = (module.router.weight.double() @ h + module.router.bias.double()).reshape(layers, experts)[layer]
        scores = softmax(logits, **how)
        vectors = module.steering_vectors[layer].double()
        return h + module.layer_scales[layer].double() * sum(s * v for s, v in zip(scores, vectors, strict=True))

    return per_token(features, steer)


def linear(layer, value):
    return layer.weight.double() @ value + layer.bias.double()


def attention(module, queries, keys, real):
    """Multi-head attention of each query to the real keys."""
    size, heads = module.size, module.num_heads
    width = size // heads
    rows = []
    for query in queries:
        parts = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            asked = linear(module.q_proj, query)[part]
            chosen = [index for index in range(len(keys)) if real[index]]
            scores = softmax([asked @ linear(module.k_proj, keys[index])[part] / math.sqrt(width) for index in chosen])
            parts.append(sum(s * linear(module.v_proj, keys[index])[part] for s, index in zip(scores, chosen, strict=True)))
        rows.append(linear(module.out_proj, torch.cat(parts)))
    return torch.stack(rows)


def cross_modal_features(module, features, text, text_mask):
    rows = []
    for h, words, real in zip(features.double(), text.double(), text_mask, strict=True):
        asking = torch.stack([linear(module.audio_projection, token) for token in h])
        answers = torch.stack([linear(module.text_projection, token) for token in words])
        attended = attention(module.cross_attention, asking, answers, real)
        rows.append(torch.stack([linear(module.alignment_layer, token) for token in attended]))
    return torch.stack(rows)


def modality_specific(module, features, text, text_mask, **how):
    rows = []
    for h, words, real in zip(features.double(), text.double(), text_mask, strict=True):
        steered = [
            w + routed(w, module.text_router.weight, module.text_router.bias, module.text_steering, **how)[1] for w in words
        ]
        mean = torch.stack([w for w, keep in zip(steered, real, strict=True) if keep]).mean(0)
        heard = [t + routed(t, module.audio_router.weight, module.audio_router.bias, module.audio_steering, **how)[1] for t in h]
        rows.append(torch.stack([linear(module.fusion_layer, torch.cat([token, mean])) for token in heard]))
    return torch.stack(rows)


def cross_modal_adapter(module, features, text, text_mask):
    first, _, second = module.audio_adapter
    rows = []
    for h, words, real in zip(features.double(), text.double(), text_mask, strict=True):
        adapted = torch.stack([linear(second, linear(first, token).clamp_min(0)) for token in h])
        rows.append(attention(module.cross_attention, adapted, words, real))
    return torch.stack(rows)
