"""What is inserted behind or inside a frozen encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_steer.config.checks import check_choice, check_count, check_indices, check_number
from hf_steer.config.frozen import FrozenMap
from hf_steer.errors import ConfigError

Kind = Literal[
    "simple", "hierarchical", "progressive", "layer_wise", "cross_modal_features", "modality_specific", "cross_modal_adapter"
]

ROUTING = ("num_experts", "top_k", "temperature", "init", "load_balancing_weight")
OPTIONS = FrozenMap(
    {
        "simple": ROUTING,
        "hierarchical": (*ROUTING, "num_global_experts"),
        "progressive": (*ROUTING, "num_stages", "feedback"),
        "layer_wise": ROUTING,
        "cross_modal_features": ("hidden_dim", "num_heads"),
        "modality_specific": ROUTING,
        "cross_modal_adapter": ("hidden_dim", "num_heads"),
    }
)
"""Which options each kind reads; any other that is given is refused."""
MOST = FrozenMap(
    {
        "num_experts": 4096, "num_global_experts": 4096, "num_stages": 64, "hidden_dim": 16_384, "num_heads": 1024, "top_k": 4096,
    }
)  # fmt: skip
"""Sizes beyond which a configuration is a mistake; it is refused before anything of that size is made."""
MOST_VECTORS = 16_384
"""The same for the experts of all stages, or of all global experts, of one aligner."""
CROSS_MODAL = ("cross_modal_features", "modality_specific", "cross_modal_adapter")
DEFAULTS = FrozenMap(
    {
        "num_experts": 8, "temperature": 1.0, "init": "zeros", "load_balancing_weight": 0.01, "num_global_experts": 4,
        "num_stages": 3, "feedback": "scores", "hidden_dim": 256, "num_heads": 8,
    }
)  # fmt: skip


@dataclass(frozen=True)
class AlignerConfig:
    """One aligner: where it goes, of which kind it is, and its sizes.

    Options that are None take the default of their kind; one that the kind does not have is refused.

    Args:
        modality: `"image"` (video goes through the same encoder) or `"audio"`.
        placement: `"output"` steers what the encoder hands on, `"layers"` the output of each of its layers, `"projector"`
            the tokens behind the projector, in the language model's own space, just before they enter it.
        kind: `"simple"` (`SteerMoEAligner`), `"hierarchical"`, `"progressive"`; `"layer_wise"` (`LayerWiseSteering`, only
            for `"layers"`; the kinds before it give each layer an aligner of its own there); and, only for `"projector"`,
            the kinds that read the prompt's text: `"cross_modal_features"`, `"modality_specific"`, `"cross_modal_adapter"`.
            In training that is the text before the first label; with several turns, label the last answer alone.
        num_experts: steering vectors per router, at least 1; 8.
        num_global_experts: of `"hierarchical"`; 4.
        num_stages: of `"progressive"`; 3.
        feedback: what later stages of `"progressive"` see: `"scores"` (default) or `"steering"`.
        hidden_dim: shared space of `"cross_modal_features"`, bottleneck of `"cross_modal_adapter"`; 256.
        num_heads: of the cross-attention; 8.
        layers: for `"layers"`: which ones, negative counts from the last; None for all.
        top_k: experts per token; None for all.
        temperature: of the routers' softmax, above 0; 1.
        init: `"zeros"` starts as the identity, `"normal"` from small random vectors.
        load_balancing_weight: of `Routing.load_balancing_loss`, which joins the model's loss in training; not negative; 0.01.
    """

    modality: Literal["image", "audio"]
    placement: Literal["output", "layers", "projector"] = "output"
    kind: Kind = "simple"
    num_experts: int | None = None
    num_global_experts: int | None = None
    num_stages: int | None = None
    feedback: Literal["scores", "steering"] | None = None
    hidden_dim: int | None = None
    num_heads: int | None = None
    layers: tuple[int, ...] | None = None
    top_k: int | None = None
    temperature: float | None = None
    init: Literal["zeros", "normal"] | None = None
    load_balancing_weight: float | None = None

    def __post_init__(self) -> None:
        check_choice("aligner.modality", self.modality, ("image", "audio"))
        check_choice("aligner.placement", self.placement, ("output", "layers", "projector"))
        check_choice("aligner.kind", self.kind, tuple(OPTIONS))
        self._fill_options()
        for name, most in MOST.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_count(f"aligner.{name}", getattr(self, name), most=most))
        vectors = (self.num_experts or 0) * max(self.num_global_experts or 1, self.num_stages or 1)
        if vectors > MOST_VECTORS:
            raise ConfigError(
                f"an aligner has at most {MOST_VECTORS:,} steering vectors; num_experts={self.num_experts} times its stages or "
                f"global experts makes {vectors:,}. Take fewer experts."
            )
        if self.top_k is not None and self.num_experts is not None and self.top_k > self.num_experts:
            raise ConfigError(f"aligner.top_k must be at most num_experts ({self.num_experts}); got {self.top_k}.")
        if self.feedback is not None:
            check_choice("aligner.feedback", self.feedback, ("scores", "steering"))
        if self.init is not None:
            check_choice("aligner.init", self.init, ("zeros", "normal"))
        self._check_numbers()
        self._check_place()

    def _fill_options(self) -> None:
        allowed = OPTIONS[self.kind]
        foreign = [name for name in {*DEFAULTS, "top_k"} - {*allowed} if getattr(self, name) is not None]
        if foreign:
            raise ConfigError(
                f"an aligner of kind {self.kind!r} has no {', '.join(sorted(foreign))}; it has {', '.join(sorted(allowed))}."
            )
        for name in allowed:
            if getattr(self, name) is None and name in DEFAULTS:
                object.__setattr__(self, name, DEFAULTS[name])

    def _check_numbers(self) -> None:
        for name, lowest, strict in (("temperature", 0, True), ("load_balancing_weight", 0, False)):
            if getattr(self, name) is None:
                continue
            value = check_number(f"aligner.{name}", getattr(self, name))
            object.__setattr__(self, name, value)
            if value < lowest or (strict and value == lowest):
                raise ConfigError(f"aligner.{name} must be {'above' if strict else 'at least'} {lowest}; got {value}.")

    def _check_place(self) -> None:
        if self.kind == "layer_wise" and self.placement != "layers":
            raise ConfigError(f"an aligner of kind 'layer_wise' goes into layers; got placement={self.placement!r}.")
        if self.kind in CROSS_MODAL and self.placement != "projector":
            raise ConfigError(
                f"an aligner of kind {self.kind!r} reads the prompt's text, which meets the features behind the projector: "
                f"use placement='projector'; got {self.placement!r}."
            )
        if self.layers is not None:
            if self.placement != "layers":
                raise ConfigError(f"aligner.layers is for placement='layers'; got placement={self.placement!r}.")
            object.__setattr__(self, "layers", check_indices("aligner.layers", self.layers, signed=True))
