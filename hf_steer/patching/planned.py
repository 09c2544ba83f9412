"""What `patch_model` is going to do, every index resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from hf_steer.config import AlignerConfig, SteerConfig
from hf_steer.config.manners import MANNERS, Manner
from hf_steer.gating import Patterns
from hf_steer.ground.parts import Anatomy, Encoder, Site

Strengths = Mapping[int, tuple[float, ...] | Tensor]
"""Layer -> λ per query head: numbers, or a tensor where they are learned."""


@dataclass(frozen=True)
class PlannedAligner:
    """One aligner, placed.

    Attributes:
        config: what the user asked for.
        encoder: whose features it steers.
        layers: the layers it steers, for placement `"layers"`.
        size: of a feature there.
        reads_text: whether it is handed the prompt's text, too.
        own_layers: whether one module is for all layers, and is handed the layer's number.
        routes: whether it can say where each token went.
    """

    config: AlignerConfig
    encoder: Encoder
    layers: tuple[Site, ...]
    size: int
    reads_text: bool = False
    own_layers: bool = False
    routes: bool = True


@dataclass(frozen=True)
class Plan:
    """Everything `patch_model` is going to do, checked, before anything is touched.

    Attributes:
        config: what the user asked for, with the base model's type filled in.
        anatomy: where it will be done.
        strengths: layer -> λ per query head, for the layers in which any λ is not 0; 1 for heads whose λ is learned.
        eyes: the vision blocks whose attention is read; empty when the source is not the tower.
        aligners: what is inserted, in the configuration's order.
        projectors: the projectors that are trained and saved with the steering.
        readers: layer -> heads whose attention is the saliency; empty when the source is another.
        manners: kind of statement -> how it is put into effect; empty without a gaze.
        patterns: the tokens of think tags and phrases; None where what is said does not matter.
    """

    config: SteerConfig
    anatomy: Anatomy
    strengths: Mapping[int, tuple[float, ...]]
    eyes: tuple[Site, ...]
    aligners: tuple[PlannedAligner, ...] = ()
    projectors: tuple[nn.Module, ...] = ()
    patterns: Patterns | None = None
    readers: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    manners: Mapping[str, Manner] = field(init=False)

    def __post_init__(self) -> None:
        attention = self.config.attention
        manners = {} if attention is None else {kind: attention.manner(kind) for kind in MANNERS}
        object.__setattr__(self, "manners", manners)

    @property
    def reads_prompt(self) -> bool:
        """Whether the scores come from the prompt as the decoder gets it, when nobody says where to look."""
        return self.config.attention is not None and self.config.attention.saliency.reads_prompt

    @property
    def gazes(self) -> bool:
        """Whether attention is steered, or was to be in a model in which none that can be was found."""
        return bool(self.strengths) or (self.config.attention is not None and not self.anatomy.layers)

    @property
    def sees(self) -> bool:
        """Whether the model itself says where to look, when nobody else does."""
        return bool(self.strengths) and self.config.attention is not None and self.config.attention.saliency.source is not None

    @property
    def trains(self) -> bool:
        """Whether the steering has parameters."""
        return self.config.has_weights
