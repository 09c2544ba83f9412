"""Where each token went: scores per expert, what is read off them, and the loss that keeps experts in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_steer.errors import AlignerError


@dataclass(frozen=True)
class Routing:
    """One forward pass's routing decisions, router by router. Nothing of it is kept by the aligner.

    Attributes:
        scores: router name -> `(..., experts)` float32, what the steering vectors were weighted with.
        probabilities: the same before top-k selection; the same tensors where all experts take part. A cross-attention's
            weights over text tokens stand in for scores (`"attention"`), but there are no probabilities of experts.
    """

    scores: Mapping[str, Tensor]
    probabilities: Mapping[str, Tensor]

    def usage(self, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Mean score of each expert over the real tokens, `(experts,)` per router."""
        return {name: _token_mean(scores, mask) for name, scores in self.scores.items()}

    def load(self, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Share of the real tokens whose largest score is the expert's, `(experts,)` per router; sums to 1."""
        return {name: _token_mean(_winners(scores), mask) for name, scores in self.scores.items()}

    def entropy(self, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Mean entropy of a token's scores in nats, from 0 (one expert) to log(experts); a scalar per router."""
        return {
            name: _token_mean(torch.special.entr(scores).sum(-1, keepdim=True), mask)[0] for name, scores in self.scores.items()
        }

    def load_balancing_loss(self, mask: Tensor | None = None) -> Tensor:
        """`experts · Σ_i f_i · P_i`, the mean over sequences and routers: 1 when balanced, at most `experts`.

        P is the mean probability of an expert over a sequence, f its share of the selections (Switch Transformers,
        https://arxiv.org/abs/2101.03961, eq. 4 to 6), or P itself where all experts take part, which has a gradient in
        both factors. Taken per sequence, as in DeepSeek-V3 (https://arxiv.org/abs/2412.19437, eq. 17 to 20), it does not
        depend on how sequences are put together in batches, devices and accumulation steps. (A Qwen-VL tower packs all pictures
        of a batch into one sequence, and there it does.)

        Args:
            mask: `(...)` bool over the tokens, True for real ones; None when all are real.

        Returns:
            A scalar with a gradient to the router; 0 for a cross-attention, which has no experts to balance.
        """
        terms = [_balance(self.scores[name], probabilities, mask) for name, probabilities in self.probabilities.items()]
        if not terms:
            return next(iter(self.scores.values())).new_zeros(())
        return torch.stack(terms).mean()


def route(logits: Tensor, *, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Scores that weight the experts, and the probabilities that they were selected from.

    Args:
        logits: `(..., experts)` float32.
        temperature: above 0; below 1 sharpens.
        top_k: experts per token, the others get 0; None for all. The scores of the chosen ones sum to 1, but for top_k=1, where
            the one keeps its probability (Switch Transformers, eq. 2).

    Returns:
        Scores and probabilities, both `(..., experts)`; one and the same tensor without selection.
    """
    logits = logits / temperature if temperature != 1.0 else logits
    probabilities = _softmax(logits)
    if top_k is None or top_k == logits.shape[-1]:
        return probabilities, probabilities
    chosen = logits.topk(top_k, dim=-1).indices
    if top_k == 1:  # renormalised it would always be 1, and the router would learn nothing from the task
        return torch.zeros_like(probabilities).scatter(-1, chosen, probabilities.gather(-1, chosen)), probabilities
    shut = torch.ones_like(logits, dtype=torch.bool).scatter(-1, chosen, False)
    return _softmax(logits.masked_fill(shut, -torch.inf)), probabilities


def merged(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Every token gets the mean of the scores of its sequence's real tokens; none where there is no real token.

    With scores that are the same for all tokens, a mixture of the experts' outputs is the output of one expert, the mixture of
    their parameters: Soft Merging of Experts with Adaptive Routing (SMEAR, https://arxiv.org/abs/2306.03745), whose expert is
    here a steering vector.

    Args:
        scores: `(..., tokens, experts)`.
        mask: `(..., tokens)` bool, True for real tokens; None when all are real.
    """
    real = _real(scores, mask).unsqueeze(-1)
    mean = (scores * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp_min(1)
    return mean.expand_as(scores)


def _softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; on a CPU experts first, since torch is several times slower over a short last dimension."""
    if logits.device.type != "cpu":
        return logits.softmax(-1)
    return logits.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1)


def _balance(scores: Tensor, probabilities: Tensor, mask: Tensor | None) -> Tensor:
    """Per sequence, then the mean; a sequence without a real token does not count."""
    experts = probabilities.shape[-1]
    flat, selected = (values.reshape(-1, *_sequence(values)) for values in (probabilities, scores))
    real = _real(probabilities, mask).reshape(flat.shape[0], flat.shape[1], 1)
    count = real.sum(1)
    mean = (flat * real).sum(1) / count.clamp_min(1)
    if scores is probabilities:
        share = mean
    else:
        picked = (selected > 0).to(flat.dtype)
        share = (picked / picked.sum(-1, keepdim=True) * real).sum(1) / count.clamp_min(1)
    per_sequence = experts * (share * mean).sum(-1)
    weight = (count[:, 0] > 0).to(flat.dtype)
    return (per_sequence * weight).sum() / weight.sum().clamp_min(1)


def _sequence(values: Tensor) -> tuple[int, int]:
    return (values.shape[-2] if values.ndim > 1 else 1, values.shape[-1])


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    """`(...)` float: 1 for real tokens."""
    if mask is None:
        return values.new_ones(values.shape[:-1])
    if mask.shape != values.shape[:-1]:
        raise AlignerError(
            f"the mask has shape {tuple(mask.shape)}; the features' leading shape is {tuple(values.shape[:-1])}. "
            "Give one value per token, True for real ones."
        )
    return mask.to(values)


def _token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    real = _real(values, mask).unsqueeze(-1)
    dims = tuple(range(values.ndim - 1))
    return (values * real).sum(dims) / real.sum().clamp_min(1)


def _winners(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
