"""The aligners, a row per kind: from a configuration to modules.

To add one, write its module and add its row here, and a test; for one of your own outside of hf_steer see
`docs/extending/router.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from hf_steer.aligners.crossmodal import CrossModalAdapter, CrossModalFeatureAligner, ModalitySpecificSteering
from hf_steer.aligners.single import HierarchicalRouter, LayerWiseSteering, ProgressiveRouter, SteerMoEAligner
from hf_steer.config import AlignerConfig
from hf_steer.registry import Router

_EXPERTS = {"num_experts": 8, "top_k": None, "temperature": 1.0, "init": "zeros", "load_balancing_weight": 0.01}
_MERGED = {**_EXPERTS, "merge": False}
_ATTENDING = {"hidden_dim": 256, "num_heads": 8}


def _routing(config: AlignerConfig) -> dict[str, Any]:
    return {"top_k": config.top_k, "temperature": config.temperature, "init": config.init}


def _merging(config: AlignerConfig) -> dict[str, Any]:
    return {**_routing(config), "merge": bool(config.merge)}


def _undivided(config: AlignerConfig, width: int) -> str | None:
    """Why attention of a width cannot have these heads."""
    if width % (config.num_heads or 1) == 0:
        return None
    return f"aligner.num_heads must divide {width}, the width of its attention; got {config.num_heads}."


OURS: Mapping[str, Router] = MappingProxyType(
    {
        "simple": Router(lambda c, size, _: SteerMoEAligner(size, c.num_experts, **_merging(c)), _MERGED),
        "hierarchical": Router(
            lambda c, size, _: HierarchicalRouter(size, c.num_experts, c.num_global_experts, **_merging(c)),
            {**_MERGED, "num_global_experts": 4},
        ),
        "progressive": Router(
            lambda c, size, _: ProgressiveRouter(size, c.num_experts, c.num_stages, feedback=c.feedback, **_merging(c)),
            {**_MERGED, "num_stages": 3, "feedback": "scores"},
        ),
        "layer_wise": Router(
            lambda c, size, layers: LayerWiseSteering(size, c.num_experts, layers, **_routing(c)), _EXPERTS,
            placements=("layers",), own_layers=True,
        ),
        "cross_modal_features": Router(
            lambda c, size, _: CrossModalFeatureAligner(size, size, c.hidden_dim, num_heads=c.num_heads), _ATTENDING,
            placements=("projector",), reads_text=True, refuse=lambda c, size: _undivided(c, c.hidden_dim),
        ),
        "modality_specific": Router(
            lambda c, size, _: ModalitySpecificSteering(size, size, c.num_experts, **_routing(c)), _EXPERTS,
            placements=("projector",), reads_text=True,
        ),
        "cross_modal_adapter": Router(
            lambda c, size, _: CrossModalAdapter(size, size, c.hidden_dim, num_heads=c.num_heads), _ATTENDING,
            placements=("projector",), reads_text=True, refuse=_undivided,
        ),
    }
)  # fmt: skip


def build_aligner(config: AlignerConfig, features: int, layers: int) -> nn.Module:
    """The module that a configuration describes, fresh.

    Args:
        config: what to build.
        features: size of a token at its place.
        layers: how many layers it goes into; 1 elsewhere. Kinds without layers of their own are built once per layer.

    Raises:
        AlignerError: sizes that do not fit together, such as a hidden_dim that is no multiple of num_heads.
    """
    row = config.row
    if config.placement == "layers" and not row.own_layers:
        return nn.ModuleList(row.build(config, features, layers) for _ in range(layers))
    return row.build(config, features, layers)
