"""From a configuration to modules: one row per kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from hf_steer.aligners.crossmodal import CrossModalAdapter, CrossModalFeatureAligner, ModalitySpecificSteering
from hf_steer.aligners.single import HierarchicalRouter, LayerWiseSteering, ProgressiveRouter, SteerMoEAligner
from hf_steer.config import AlignerConfig


def _routing(config: AlignerConfig) -> dict[str, Any]:
    return {"top_k": config.top_k, "temperature": config.temperature, "init": config.init}


KINDS: Mapping[str, Callable[[Any, int, int], nn.Module]] = MappingProxyType(
    {
        "simple": lambda c, size, _: SteerMoEAligner(size, c.num_experts, **_routing(c)),
        "hierarchical": lambda c, size, _: HierarchicalRouter(size, c.num_experts, c.num_global_experts, **_routing(c)),
        "progressive": lambda c, size, _: ProgressiveRouter(
            size, c.num_experts, c.num_stages, feedback=c.feedback, **_routing(c)
        ),
        "layer_wise": lambda c, size, layers: LayerWiseSteering(size, c.num_experts, layers, **_routing(c)),
        "cross_modal_features": lambda c, size, _: CrossModalFeatureAligner(
            size, size, c.hidden_dim, num_heads=c.num_heads
        ),
        "modality_specific": lambda c, size, _: ModalitySpecificSteering(size, size, c.num_experts, **_routing(c)),
        "cross_modal_adapter": lambda c, size, _: CrossModalAdapter(size, size, c.hidden_dim, num_heads=c.num_heads),
    }
)


def build_aligner(config: AlignerConfig, features: int, layers: int) -> nn.Module:
    """The module that a configuration describes, fresh.

    Args:
        config: what to build.
        features: size of a token at its place.
        layers: how many layers it goes into; 1 elsewhere. Kinds without layers of their own are built once per layer.

    Raises:
        AlignerError: sizes that do not fit together, such as a hidden_dim that is no multiple of num_heads.
    """
    if config.placement == "layers" and config.kind != "layer_wise":
        return nn.ModuleList(KINDS[config.kind](config, features, layers) for _ in range(layers))
    return KINDS[config.kind](config, features, layers)
