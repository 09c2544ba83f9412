"""Aligners that read one stream of features: simple, hierarchical, progressive, and layer by layer.

All add a weighted sum of steering vectors to each token. They start as the identity, since the vectors start at zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hf_steer.aligners.routing import Routing, merged, route
from hf_steer.aligners.skinny import Router, add_steering, full_precision
from hf_steer.errors import AlignerError

Init = Literal["zeros", "normal"]


class SteerMoEAligner(nn.Module):
    """One softmax router over steering vectors: `h + Σ_k g_k(h) · v_k`.

    Paper: SteerMoE: Efficient Audio-Language Alignment with a Mixture-of-Experts Steering Module
    (https://github.com/forfrt/SteerMoE). Its g is `router`, its v `steering_vectors`. We start from zero vectors, so that a
    fresh aligner changes nothing; `init="normal"` starts from random ones.

    Args:
        features: size of a token.
        num_experts: how many steering vectors, at least 1.
        top_k: experts per token, 1 to num_experts; None for all.
        temperature: of the softmax, above 0.
        init: `"zeros"`, or `"normal"` with standard deviation `init_scale`.
        init_scale: above 0.
        merge: steer all tokens of a sequence with the mean of their scores; without top_k.

    Raises:
        AlignerError: a size or an option out of its range.
    """

    def __init__(
        self, features: int, num_experts: int, *, top_k: int | None = None, temperature: float = 1.0,
        init: Init = "zeros", init_scale: float = 0.02, merge: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(features=features, num_experts=num_experts)
        check_routing(num_experts, top_k, temperature, merge=merge)
        self.top_k, self.temperature, self.merge = top_k, temperature, merge
        self.router = Router(features, num_experts)
        self.steering_vectors = make_vectors((num_experts, features), init, init_scale)

    def forward(
        self, features: Tensor, *, mask: Tensor | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Steer `(..., features)`; with `return_routing` also the `Routing` (router `"experts"`).

        The mask `(...)`, True for real tokens, matters where experts are merged; the last of its dimensions is a sequence.
        """
        with full_precision(features):
            logits, features = self.router(features)
            scores, probabilities = route(logits, temperature=self.temperature, top_k=self.top_k)
            if self.merge:
                scores = probabilities = merged(scores, mask)
            steered = add_steering(features, scores, self.steering_vectors)
        return (steered, Routing({"experts": scores}, {"experts": probabilities})) if return_routing else steered


class HierarchicalRouter(nn.Module):
    """A global router chooses among local routers: `h + Σ_i g_i · (u_i + Σ_j l_ij · v_ij)`.

    g is a softmax over global experts, l_i one over the experts of global expert i, u `global_steering`, v `local_steering`.
    All logits come from one product with `router`, whose first `num_global_experts` rows are the global router's and whose
    next ones the local routers', one after the other; `g_i` and `g_i · l_ij` then weight all vectors in one product.

    Args:
        features: size of a token.
        num_experts: local experts per global one, at least 1.
        num_global_experts: at least 1.
        top_k: local experts per token and global expert, 1 to num_experts; None for all.
        temperature: of all softmaxes, above 0.
        init: of the steering vectors, see `SteerMoEAligner`.
        init_scale: above 0.
        merge: see `SteerMoEAligner`.

    Raises:
        AlignerError: a size or an option out of its range.
    """

    def __init__(
        self, features: int, num_experts: int, num_global_experts: int = 4, *, top_k: int | None = None,
        temperature: float = 1.0, init: Init = "zeros", init_scale: float = 0.02, merge: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(features=features, num_experts=num_experts, num_global_experts=num_global_experts)
        check_routing(num_experts, top_k, temperature, merge=merge)
        self.top_k, self.temperature, self.merge = top_k, temperature, merge
        self.router = Router(features, num_global_experts * (1 + num_experts))
        self.global_steering = make_vectors((num_global_experts, features), init, init_scale)
        self.local_steering = make_vectors((num_global_experts, num_experts, features), init, init_scale)

    def forward(
        self, features: Tensor, *, mask: Tensor | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Steer `(..., features)`; with `return_routing` also the `Routing` (`"global"`, `"local_0"`, ...); the mask as above."""
        groups, experts, _ = self.local_steering.shape
        with full_precision(features):
            logits, features = self.router(features)
            g, g_all = route(logits[..., :groups], temperature=self.temperature, top_k=None)
            local = logits[..., groups:].unflatten(-1, (groups, experts))
            l, l_all = route(local, temperature=self.temperature, top_k=self.top_k)  # noqa: E741 - the formula's name
            weights = torch.cat([g, (g.unsqueeze(-1) * l).flatten(-2)], -1)
            if self.merge:
                weights, g = merged(weights, mask), merged(g, mask)
                g_all, l = g, merged(l.flatten(-2), mask).unflatten(-1, (groups, experts))  # noqa: E741 - the same
                l_all = l
            steered = add_steering(features, weights, torch.cat([self.global_steering, self.local_steering.flatten(0, 1)]))
        if not return_routing:
            return steered
        scores, probabilities = {"global": g}, {"global": g_all}
        for group in range(groups):
            scores[f"local_{group}"] = l[..., group, :]
            probabilities[f"local_{group}"] = scores[f"local_{group}"] if l is l_all else l_all[..., group, :]
        return steered, Routing(scores, probabilities)


class ProgressiveRouter(nn.Module):
    """Stages of routing, each of which knows what the earlier ones did: `h + Σ_s Σ_k g_sk · v_sk`.

    The seed builds stage s for `features + s · num_experts` inputs, the earlier stages' scores (`feedback="scores"`), and
    feeds it the steering accumulated so far (`feedback="steering"`); both are here. With the steering fed back, stage s reads
    `W_s · Σ_{r<s} g_r V_r = Σ_{r<s} (W_s V_rᵀ) g_r`: only the small matrix `W_s V_rᵀ` is needed, so that either way the
    features are read once for all stages and written once.

    Args:
        features: size of a token.
        num_experts: steering vectors per stage, at least 1.
        num_stages: at least 1.
        feedback: what later stages see beside the features.
        top_k: experts per token and stage, 1 to num_experts; None for all.
        temperature: of all softmaxes, above 0.
        init: of the steering vectors, see `SteerMoEAligner`.
        init_scale: above 0.
        merge: see `SteerMoEAligner`.

    Raises:
        AlignerError: a size or an option out of its range.
    """

    def __init__(
        self, features: int, num_experts: int, num_stages: int = 3, *, feedback: Literal["scores", "steering"] = "scores",
        top_k: int | None = None, temperature: float = 1.0, init: Init = "zeros", init_scale: float = 0.02, merge: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(features=features, num_experts=num_experts, num_stages=num_stages)
        check_routing(num_experts, top_k, temperature, merge=merge)
        if feedback not in ("scores", "steering"):
            raise AlignerError(f"feedback must be 'scores' or 'steering'; got {feedback!r}.")
        self.feedback, self.top_k, self.temperature, self.merge = feedback, top_k, temperature, merge
        self.router = Router(features, num_stages * num_experts)
        self.stage_steering = make_vectors((num_stages, num_experts, features), init, init_scale)
        for stage in range(1, num_stages):
            inputs = stage * num_experts if feedback == "scores" else features
            bound = (features + inputs) ** -0.5  # as nn.Linear does for the features and the feedback side by side
            weight = torch.empty(num_experts, inputs).uniform_(-bound, bound)
            self.register_parameter(f"feedback_{stage}", nn.Parameter(weight))

    def forward(
        self, features: Tensor, *, mask: Tensor | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Steer `(..., features)`; with `return_routing` also the `Routing` (`"stage_0"`, ...); the mask as above.

        Where experts are merged, a stage sees what the whole sequence was steered with before.
        """
        stages, experts, _ = self.stage_steering.shape
        scores: list[Tensor] = []
        probabilities: list[Tensor] = []
        with full_precision(features):
            logits, features = self.router(features)
            for stage, own in enumerate(logits.unflatten(-1, (stages, experts)).unbind(-2)):
                if stage:
                    own = own + torch.cat(scores, -1) @ self._from_scores(stage).to(own.dtype)
                chosen, all_of_them = route(own, temperature=self.temperature, top_k=self.top_k)
                if self.merge:
                    chosen = all_of_them = merged(chosen, mask)
                scores.append(chosen)
                probabilities.append(all_of_them)
            steered = add_steering(features, torch.cat(scores, -1), self.stage_steering.flatten(0, 1))
        if not return_routing:
            return steered
        names = [f"stage_{stage}" for stage in range(stages)]
        return steered, Routing(dict(zip(names, scores, strict=True)), dict(zip(names, probabilities, strict=True)))

    def _from_scores(self, stage: int) -> Tensor:
        """`(stage · experts, experts)`: how the scores of earlier stages enter the logits of this one."""
        weight: Tensor = getattr(self, f"feedback_{stage}")
        return weight.t() if self.feedback == "scores" else self.stage_steering[:stage].flatten(0, 1) @ weight.t()


class LayerWiseSteering(nn.Module):
    """One router shared by all layers of an encoder, vectors and a scale per layer: `h_l + a_l · Σ_k g_lk(h_l) · v_lk`.

    SteerMoE's own form (https://github.com/forfrt/SteerMoE): the router maps features to `layers × experts` logits, of which
    layer l uses its slice. Only that slice is computed here.

    Args:
        features: size of a token.
        num_experts: steering vectors per layer, at least 1.
        num_layers: at least 1.
        top_k: experts per token, 1 to num_experts; None for all.
        temperature: of the softmax, above 0.
        scale: what the learned layer scales start from.
        init: of the steering vectors, see `SteerMoEAligner`.
        init_scale: above 0.

    Raises:
        AlignerError: a size or an option out of its range.
    """

    def __init__(
        self, features: int, num_experts: int, num_layers: int, *, top_k: int | None = None, temperature: float = 1.0,
        scale: float = 1.0, init: Init = "zeros", init_scale: float = 0.02,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(features=features, num_experts=num_experts, num_layers=num_layers)
        check_routing(num_experts, top_k, temperature)
        self.top_k, self.temperature = top_k, temperature
        self.router = Router(features, num_layers * num_experts)
        self.steering_vectors = make_vectors((num_layers, num_experts, features), init, init_scale)
        self.layer_scales = nn.Parameter(torch.full((num_layers,), float(scale)))

    def forward(self, features: Tensor, layer: int, *, return_routing: bool = False) -> Tensor | tuple[Tensor, Routing]:
        """Steer the output `(..., features)` of one layer, 0 to num_layers - 1.

        Raises:
            AlignerError: a layer that is not there, or features of another size.
        """
        layers, experts, _ = self.steering_vectors.shape
        if not 0 <= layer < layers:
            raise AlignerError(f"layer {layer} is not there; this aligner was built for {layers} layers, 0 to {layers - 1}.")
        with full_precision(features):
            logits, features = self.router(features, slice(layer * experts, (layer + 1) * experts))
            scores, probabilities = route(logits, temperature=self.temperature, top_k=self.top_k)
            steered = add_steering(features, scores, self.layer_scales[layer] * self.steering_vectors[layer])
        name = f"layer_{layer}"
        return (steered, Routing({name: scores}, {name: probabilities})) if return_routing else steered


def make_vectors(shape: tuple[int, ...], init: Init, scale: float) -> nn.Parameter:
    """Steering vectors: zeros, or normal with a standard deviation."""
    if init not in ("zeros", "normal"):
        raise AlignerError(f"init must be 'zeros' or 'normal'; got {init!r}.")
    if not scale > 0:
        raise AlignerError(f"init_scale must be above 0; got {scale}.")
    return nn.Parameter(torch.zeros(shape) if init == "zeros" else torch.randn(shape) * scale)


def check_sizes(**sizes: int) -> None:
    """Every size a positive whole number."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise AlignerError(f"{name} must be a whole number of at least 1; got {size!r}.")


def check_routing(num_experts: int, top_k: int | None, temperature: float, *, merge: bool = False) -> None:
    """Options that all routers share."""
    if merge and top_k is not None:
        raise AlignerError(f"merge=True blends all experts, so there is none to select; got top_k={top_k}. Leave one of them out.")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts):
        raise AlignerError(f"top_k must be 1 to num_experts ({num_experts}), or None for all; got {top_k!r}.")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not temperature > 0:
        raise AlignerError(f"temperature must be a number above 0; got {temperature!r}.")
