"""What is inserted behind or inside a frozen encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hf_steer.config.checks import check_choice, check_count, check_flag, check_indices, check_number
from hf_steer.config.frozen import FrozenMap
from hf_steer.config.options import fill_options
from hf_steer.errors import ConfigError
from hf_steer.registry import ROUTERS, Router

MOST = FrozenMap(
    {
        "num_experts": 4096, "num_global_experts": 4096, "num_stages": 64, "hidden_dim": 16_384, "num_heads": 1024, "top_k": 4096,
    }
)  # fmt: skip
"""Sizes beyond which a configuration is a mistake; it is refused before anything of that size is made."""
MOST_VECTORS = 16_384
"""The same for the experts of all stages, or of all global experts, of one aligner."""
OPTIONS = (*MOST, "temperature", "init", "load_balancing_weight", "feedback", "merge")
"""Those that have a field; which of them a kind reads, and their defaults, its row of `registry.ROUTERS` says."""


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
            In training that is the text before the first label; with several turns, label the last answer alone. Others that
            plugins or `register_router` have added.
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
        merge: True to steer all of a sequence alike, with the experts merged by the mean of its tokens' scores (SMEAR); of
            `"simple"`, `"hierarchical"` and `"progressive"` at placement `"projector"`, where the prompt says which tokens are one
            sequence's and which are padding; without top_k. False.
        options: those of a kind that somebody else added, and for which there is no field.
    """

    modality: Literal["image", "audio"]
    placement: Literal["output", "layers", "projector"] = "output"
    kind: str = "simple"
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
    merge: bool | None = None
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_choice("aligner.modality", self.modality, ("image", "audio"))
        check_choice("aligner.placement", self.placement, ("output", "layers", "projector"))
        row = ROUTERS.find(self.kind, "aligner.kind must be one of {known}; got {got}{near}.")
        fill_options(self, f"an aligner of kind {self.kind!r}", row.options, OPTIONS)
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
        if self.merge is not None:
            check_flag("aligner.merge", self.merge)
            self._check_merge()

    @property
    def row(self) -> Router:
        """What the table knows of its kind."""
        return ROUTERS[self.kind]

    def _check_numbers(self) -> None:
        for name, lowest, strict in (("temperature", 0, True), ("load_balancing_weight", 0, False)):
            if getattr(self, name) is None:
                continue
            value = check_number(f"aligner.{name}", getattr(self, name))
            object.__setattr__(self, name, value)
            if value < lowest or (strict and value == lowest):
                raise ConfigError(f"aligner.{name} must be {'above' if strict else 'at least'} {lowest}; got {value}.")

    def _check_place(self) -> None:
        row, kind = self.row, f"an aligner of kind {self.kind!r}"
        if self.placement not in row.placements:
            raise ConfigError(
                f"{kind} reads the prompt's text, which meets the features behind the projector: use placement='projector'; "
                f"got {self.placement!r}."
                if row.reads_text
                else f"{kind} goes into {' or '.join(row.placements)}; got placement={self.placement!r}."
            )
        if self.layers is not None:
            if self.placement != "layers":
                raise ConfigError(f"aligner.layers is for placement='layers'; got placement={self.placement!r}.")
            object.__setattr__(self, "layers", check_indices("aligner.layers", self.layers, signed=True))

    def _check_merge(self) -> None:
        if self.merge and self.placement != "projector":
            raise ConfigError(
                "aligner.merge takes a mean over the tokens of one sequence; only in the prompt is it known which those are: use "
                f"placement='projector'; got {self.placement!r}."
            )
        if self.merge and self.top_k is not None:
            raise ConfigError(f"aligner.merge blends all experts, none is selected; got top_k={self.top_k}. Leave one of them out.")
