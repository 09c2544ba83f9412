"""Mixtures of steering experts: pure modules that know nothing of models."""

from hf_steer.aligners.crossmodal import CrossModalAdapter, CrossModalFeatureAligner, ModalitySpecificSteering
from hf_steer.aligners.mixing import mixes_tokens
from hf_steer.aligners.routers import build_aligner
from hf_steer.aligners.routing import Routing
from hf_steer.aligners.single import HierarchicalRouter, LayerWiseSteering, ProgressiveRouter, SteerMoEAligner

__all__ = [
    "CrossModalAdapter",
    "CrossModalFeatureAligner",
    "HierarchicalRouter",
    "LayerWiseSteering",
    "ModalitySpecificSteering",
    "ProgressiveRouter",
    "Routing",
    "SteerMoEAligner",
    "build_aligner",
    "mixes_tokens",
]
