"""The published simulation of steering, with every printed digit of its table.

"Cross-Modal Attention Steerability via Residual Latent Shifting (Simulation)", 2026-02-15, looks at one attention layer of
random logits: what do entropy and distribution do when λ times a saliency is added before the softmax? Its symbols and ours:

    Z ~ Normal(0, 0.1)                    `logits`, `(queries, keys)` of one head, with as many queries as keys
    A = softmax(Z)                        `attention`
    s = normalize(|Normal(0, 1)|)         `saliency`, `(keys,)`, into [0, 1] by minimum and maximum
    A' = softmax(log(A + eps) + λ s)      `steered`

It says neither how s is normalised nor how the numbers are drawn; what is written here gives its figures: one generator per
seed, s before Z, float32, eps = 1e-8. Beyond it, each row compares A' with the form that `hf_steer` runs in models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_steer.attention import BACKENDS, AttentionCall
from hf_steer.config.checks import check_count, check_indices, check_number
from hf_steer.errors import ConfigError
from hf_steer.ground.attention_call import options_of
from hf_steer.ground.implementations import function_of
from hf_steer.saliency import NORMALIZERS
from hf_steer.values import HeadBias

PUBLISHED: Mapping[float, tuple[float, float]] = MappingProxyType(
    {
        0.0: (-0.0, -0.0),
        0.05: (0.0005, 0.000034),
        0.1: (0.0020, 0.000135),
        0.15: (0.0044, 0.000305),
        0.25: (0.0125, 0.000852),
        0.4: (0.0326, 0.002201),
        0.6: (0.0751, 0.005015),
        0.8: (0.1368, 0.009027),
        1.0: (0.2192, 0.014284),
    }
)
"""λ -> entropy reduction (%) and KL (nats), as published: 1024 tokens, 32 heads, mean over 3 seeds."""

STRENGTHS = tuple(PUBLISHED)
LOGIT_SPREAD = 0.1
FOLDED_QUERIES = 128
"""Queries of the first head, per seed, in which the folded form is compared: it costs queries × keys² here."""


@dataclass(frozen=True)
class SimulationRow:
    """One strength.

    Attributes:
        strength: λ.
        entropy_reduction_percent: `100 (H - H') / H`, where H is the mean entropy of a query; the mean over seeds.
        kl_nats: KL(A ‖ A') of a query, the mean over queries, heads and seeds; eps keeps it below `-log(eps)`.
        folded_max_difference: largest absolute difference between probabilities of A' and of the folded form.
    """

    strength: float
    entropy_reduction_percent: float
    kl_nats: float
    folded_max_difference: float


@dataclass(frozen=True)
class SteeredQuery:
    """One query to look at: its keys' saliency, and its attention to them before and after, each `(keys,)`."""

    saliency: Tensor
    before: Tensor
    after: Tensor


def simulate(
    strengths: Sequence[float] = STRENGTHS,
    seeds: Sequence[int] = (0, 1, 2),
    tokens: int = 1024,
    heads: int = 32,
    *,
    eps: float = 1e-8,
) -> tuple[SimulationRow, ...]:
    """Steer one layer of random attention and measure what it does; the defaults give the published table.

    `folded_max_difference` compares the dense A' with `hf_steer`'s folded backend on torch's fused attention. That needs
    queries and keys, so `log(A + eps) = q·kᵀ` is factored as `q = log(A + eps)`, `k = identity`; λ and s become one more
    channel, `q' = [q, λ]`, `k' = [k, s]`, and `V = identity` makes the output the distribution. All strengths and seeds,
    the first `FOLDED_QUERIES` queries of the first head.

    Args:
        strengths: λ, finite, one row each.
        seeds: one draw of saliency and logits each; not negative, none twice.
        tokens: queries, and keys, at least 2. Memory and time grow with their square.
        heads: drawn and measured one after the other.
        eps: added to probabilities before a logarithm, from 1.2e-38 (float32's smallest normal number) to below 1.

    Returns:
        A row per strength, in the order given.

    Raises:
        ConfigError: an argument is outside its range.
    """
    strengths, seeds = _check(strengths, seeds, tokens, heads, eps)
    with tqdm(total=len(seeds) * heads, desc="simulation", unit="head", leave=False) as progress:
        by_seed = [_measure_seed(strengths, seed, tokens, heads, eps, progress) for seed in seeds]
    return tuple(
        SimulationRow(
            strength,
            sum(reduction for reduction, _, _ in found) / len(seeds),
            sum(kl for _, kl, _ in found) / len(seeds),
            max(difference for _, _, difference in found),
        )
        for strength, found in zip(strengths, zip(*by_seed, strict=True), strict=True)
    )


def steered_query(strength: float = 0.25, *, seed: int = 0, tokens: int = 1024, eps: float = 1e-8) -> SteeredQuery:
    """The first query of the first head of `simulate` with the same arguments.

    Raises:
        ConfigError: as `simulate`.
    """
    _check((strength,), (seed,), tokens, 1, eps)
    saliency, layer = _draw(seed, tokens, 1)
    attention = torch.softmax(next(layer)[0], -1)
    return SteeredQuery(saliency, attention, _steer(torch.log(attention + eps), saliency, strength))


def _draw(seed: int, tokens: int, heads: int) -> tuple[Tensor, Iterator[Tensor]]:
    """Saliency, and the logits of head after head: at 1024 tokens the same numbers as all heads at once, in less memory.

    float32 is part of the published figures: the true KL at λ = 0 is +1.6e-12, which prints as 0.000000; the published
    minus sign is float32's rounding. (The minus sign of the entropy reduction there is eps, which mixes A with a
    uniform distribution.)
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    saliency = NORMALIZERS["minmax"](draw(tokens).abs(), math.inf)
    return saliency, (draw(tokens, tokens) * LOGIT_SPREAD for _ in range(heads))


def _steer(log_attention: Tensor, saliency: Tensor, strength: float) -> Tensor:
    return torch.softmax(log_attention + strength * saliency, -1)


def _measure_seed(
    strengths: tuple[float, ...], seed: int, tokens: int, heads: int, eps: float, progress: tqdm[None]
) -> list[tuple[float, float, float]]:
    """Entropy reduction (%), KL (nats) and the folded form's difference, per strength."""
    saliency, layer = _draw(seed, tokens, heads)
    entropy = 0.0
    entropies, kls, differences = ([0.0] * len(strengths) for _ in range(3))
    for head, logits in enumerate(layer):
        attention = torch.softmax(logits, -1)
        log_attention = torch.log(attention + eps)
        entropy += _mean_entropy(attention, log_attention) / heads
        for number, strength in enumerate(strengths):
            steered = _steer(log_attention, saliency, strength)
            log_steered = torch.log(steered + eps)
            entropies[number] += _mean_entropy(steered, log_steered) / heads
            kls[number] += float((attention * (log_attention - log_steered)).sum(-1).mean()) / heads
            if head == 0:
                folded = _fold(log_attention[:FOLDED_QUERIES], saliency, strength)
                differences[number] = float((folded - steered[:FOLDED_QUERIES]).abs().max())
        progress.update()
    reductions = [100 * (entropy - steered_entropy) / entropy for steered_entropy in entropies]
    return list(zip(reductions, kls, differences, strict=True))


def _mean_entropy(probabilities: Tensor, logarithms: Tensor) -> float:
    return -float((probabilities * logarithms).sum(-1).mean())


def _fold(log_attention: Tensor, saliency: Tensor, strength: float) -> Tensor:
    """`(queries, keys)`: the same distribution with the bias as a channel of queries and keys; see `simulate`."""
    keys = torch.ones_like(saliency).diag()[None, None]
    bias = HeadBias(saliency.new_full((1, 1, 1, 1), strength), saliency[None, :, None])
    call = AttentionCall(
        torch.nn.Module(), function_of("sdpa", torch.nn.Module), "sdpa", log_attention[None, None], keys, keys, None, bias,
        options_of(scale=1.0, causal=False),
    )  # fmt: skip
    output, _ = BACKENDS["folded"].attend(call, bias)
    distribution: Tensor = output[0, :, 0]  # transformers puts the heads behind the queries
    return distribution


def _check(
    strengths: Sequence[float], seeds: Sequence[int], tokens: int, heads: int, eps: float
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    limits = torch.finfo(torch.float32)
    try:
        strengths = tuple(strengths)
    except TypeError as error:
        raise ConfigError(f"strengths must be a sequence of numbers, such as (0.0, 0.25); got {strengths!r}.") from error
    if not strengths:
        raise ConfigError("strengths must not be empty; give at least one λ, such as (0.25,).")
    for strength in strengths:
        check_number("strength", strength)
    seeds = check_indices("seeds", seeds, bits=64)
    check_count("heads", heads)
    check_count("tokens", tokens)
    if tokens < 2:
        raise ConfigError("tokens must be at least 2; got 1: a single token has all the attention, and no entropy to reduce.")
    check_number("eps", eps)
    if not limits.tiny <= eps < 1:
        raise ConfigError(f"eps must be at least {limits.tiny:.1e} and below 1; got {eps!r}.")
    return strengths, seeds
