"""The gaze: which heads are biased towards what, and how hard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hf_steer.checks import (
    Heads,
    Strength,
    check_choice,
    check_flag,
    check_heads,
    check_indices,
    check_number,
    check_strength,
)
from hf_steer.errors import ConfigError

NORMALIZATIONS = ("zscore", "minmax", "rank", "none")
SOURCES = ("vision_attention", "vision_rollout", None)
QUERIES = ("all", "generated")
BACKENDS = ("auto", "folded", "mask")


@dataclass(frozen=True)
class SaliencyConfig:
    """Where the score of each token comes from, and how it is scaled.

    Args:
        source: `"vision_attention"` reads the model's own eyes: the attention that each patch receives in the vision
            tower. `"vision_rollout"` follows that attention through the blocks, residual connections included
            (https://arxiv.org/abs/2005.00928). None takes only what `use_saliency` supplies.
        normalize: per picture, per video frame, or over the row's real tokens for token scores. `"zscore"` is clipped
            at `clip`, and a few far outliers do not set its scale (see `hf_steer.saliency.normalize`); `"minmax"` and
            `"rank"` give [0, 1]; `"none"` uses the scores as they are. Constant scores become zeros.
        clip: largest absolute z-score, above 0. Two outlier patches would otherwise take most of the bias.
        blocks: vision blocks to read, or `"all"`; negative counts from the last whose output the model reads. Several
            are averaged, or rolled out. None: the last for `"vision_attention"`, all for `"vision_rollout"`.
        preserve_mass: subtract `log mean exp(λs)` over each group, so that the bias moves attention *within* a picture
            rather than towards it. Exact where the unsteered attention inside the picture is uniform.
    """

    source: Literal["vision_attention", "vision_rollout"] | None = "vision_attention"
    normalize: Literal["zscore", "minmax", "rank", "none"] = "zscore"
    clip: float = 3.0
    blocks: tuple[int, ...] | Literal["all"] | None = None
    preserve_mass: bool = False

    def __post_init__(self) -> None:
        check_choice("saliency.source", self.source, SOURCES)
        check_choice("saliency.normalize", self.normalize, NORMALIZATIONS)
        check_number("saliency.clip", self.clip)
        if self.clip <= 0:
            raise ConfigError(f"saliency.clip must be above 0; got {self.clip}. The default is 3.0.")
        check_flag("saliency.preserve_mass", self.preserve_mass)
        if self.blocks is not None and self.blocks != "all":
            blocks = (self.blocks,) if isinstance(self.blocks, int) else self.blocks
            object.__setattr__(self, "blocks", check_indices("saliency.blocks", blocks, signed=True))


@dataclass(frozen=True)
class AttentionConfig:
    """Which heads are biased towards salient tokens, how hard, and for which queries.

    The bias is `λ_h · s_k`, added to the attention logits: `softmax(q·kᵀ/√d + λ_h·s_k)`.

    Args:
        heads: `"all"`, or `{layer: heads}` with a tuple of query heads or `"all"`. Layers count from 0; negative
            layers count from the last.
        strength: λ. One number, `{layer: number}`, or `{layer: {head: number}}`. Negative turns the gaze away.
        saliency: where the scores come from.
        queries: `"all"`, or `"generated"`: only queries out of which a token is generated, the prompt's last token
            included (the first new token comes out of it). In a training step these are the positions before a label.
        backend: `"auto"` folds the bias into the head dimension for prompts and adds a mask for single queries;
            `"folded"` and `"mask"` do one of the two always.
    """

    heads: Heads = "all"
    strength: Strength = 1.0
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    queries: Literal["all", "generated"] = "all"
    backend: Literal["auto", "folded", "mask"] = "auto"

    def __post_init__(self) -> None:
        check_choice("attention.queries", self.queries, QUERIES)
        check_choice("attention.backend", self.backend, BACKENDS)
        if not isinstance(self.saliency, SaliencyConfig):
            raise ConfigError(f"attention.saliency must be a SaliencyConfig; got {type(self.saliency).__name__}.")
        object.__setattr__(self, "heads", check_heads(self.heads))
        object.__setattr__(self, "strength", check_strength(self.strength))
        self._refuse_strength_elsewhere()

    def _refuse_strength_elsewhere(self) -> None:
        """A strength for a layer or head that is not steered would be ignored; a steered one without would be a guess."""
        if not isinstance(self.strength, Mapping) or not isinstance(self.heads, Mapping):
            return
        if set(self.strength) != set(self.heads):
            raise ConfigError(
                f"attention.strength names layers {sorted(self.strength)}, attention.heads {sorted(self.heads)}; "
                "give a strength for just the layers that are steered."
            )
        for layer, strength in self.strength.items():
            heads = self.heads[layer]
            if isinstance(strength, Mapping) and not isinstance(heads, str) and set(strength) != set(heads):
                raise ConfigError(
                    f"attention.strength of layer {layer} names heads {sorted(strength)}, attention.heads "
                    f"{sorted(heads)}; give a strength for just the heads that are steered."
                )
