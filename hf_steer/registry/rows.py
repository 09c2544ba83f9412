"""One row of each table: what hf_steer has to be told of a family, a backend, a source, a gate or a router.

Calls, readings and configurations that functions of a row are handed belong to rooms above this one; the texts name them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from hf_steer.errors import ConfigError

if TYPE_CHECKING:  # configurations are checked against these rows, and do without torch
    from torch import Tensor, nn

    from hf_steer.values import HeadBias

NOTHING: Mapping[str, Any] = MappingProxyType({})
Blocks = tuple[int, ...] | Literal["all"]


@dataclass(frozen=True)
class EncoderRow:
    """An ear or an eye. Module paths are the ends of dotted names, since what comes before them changes between versions.

    Attributes:
        layers: of the encoder.
        outlet: what hands the features on, `"output"` of the encoder or `"projector"`, whose input they are.
        projector: what maps them into the language model's space; None where nothing does.
        tower: path of the encoder from `model.base_model`; None to ask `model.get_encoder(modality)`.
        mask: our word for the argument that says which mel frames or samples are real; None where there is none.
    """

    layers: str = "layers"
    outlet: Literal["output", "projector"] = "projector"
    projector: str | None = "multi_modal_projector"
    tower: str | None = None
    mask: str | None = None


@dataclass(frozen=True)
class Family:
    """What structure cannot say of the models of one `config.model_type`.

    Attributes:
        decoder: path of the decoder from the model, where `model.get_decoder()` does not give it; its attention is found in it.
        blocks: path of the blocks from a vision tower whose attention can be read; None for other families.
        block_attention: path of the attention module from a block.
        placeholders: modalities that have placeholder tokens in the prompt.
        layout: row of `saliency.LAYOUTS` that says where in a picture or sound each placeholder token lies; or a function like
            those that are in it; several where pictures and sounds have one each. Without `placeholders` it says where what an
            encoder hands on to a cross-attending decoder lies, row by row, as many pictures in each.
        windowed: the tower permutes patches into windows before its blocks (Qwen2.5-VL).
        arrangement: how the model lays out what the tower saw as tokens: `"whole"`, every picture its patches; `"anyres"`,
            base, crops and newlines, and pooled video; None where merge blocks are tokens already (Qwen-VL).
        encoders: modality -> where its aligners go.
        composes: the logits are what the head gives, so that a composed model's head can stand for the decoder's own.
        frame_seconds: how much of a sound one position of what the encoder hands on stands for, where a decoder reads it by
            cross-attention.
        counts_items: the model's loss heeds Trainer's count of labels over all accumulation steps.
    """

    decoder: str | None = None
    blocks: str | None = None
    block_attention: str = "attn"
    placeholders: tuple[str, ...] = ()
    layout: str | Callable[..., Any] | tuple[str | Callable[..., Any], ...] | None = None
    windowed: bool = False
    arrangement: Literal["whole", "anyres"] | None = None
    encoders: Mapping[str, EncoderRow] = field(default_factory=lambda: NOTHING)
    composes: bool = False
    frame_seconds: float | None = None
    counts_items: bool = True


@dataclass(frozen=True)
class Backend:
    """A way to carry the bias through a decoder layer's attention.

    Attributes:
        attend: from an `attention.AttentionCall` and its `HeadBias` to what the function underneath would return:
            `(batch, queries, heads, value_dim)`, and weights or None.
        refuse: why it cannot carry a call's bias, in a few words; None where it can. Without one it can carry any.
        over: the attention implementations whose masks it understands.
        instead: it runs a kernel of its own instead of the function underneath.
    """

    attend: Callable[[Any, HeadBias], tuple[Any, Any]]
    refuse: Callable[[Any], str | None] | None = None
    over: tuple[str, ...] = ("eager", "sdpa")
    instead: bool = False


@dataclass(frozen=True)
class Source:
    """Where raw scores come from: out of the vision tower's attention, or out of the prompt as the decoder gets it.

    Options with names of `SaliencyConfig`'s fields are set there; of others the values reach the function as keywords, out of
    `SaliencyConfig(options={...})`.

    Attributes:
        eyes: from what the chosen blocks attend with, a sequence of `saliency.Segment` per block, to `(patches,)` float32.
        prompt: from a `saliency.Sight` to `(rows, tokens)` scores. A source has one of the two.
        options: name -> value where none is given.
        blocks: those that `eyes` reads where none are given: `"all"`, or indices; negative ones count from the last.
        reads_heads: `prompt` calls `Sight.attend`: the steered heads, or `source_heads` if that is an option, are read.
    """

    eyes: Callable[..., Tensor] | None = None
    prompt: Callable[..., Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    blocks: Blocks = (-1,)
    reads_heads: bool = False

    def __post_init__(self) -> None:
        if (self.eyes is None) == (self.prompt is None):
            raise ConfigError("a Source reads either the vision tower (eyes=...) or the prompt (prompt=...); give one of the two.")


@dataclass(frozen=True)
class Gate:
    """What opens a gate: the next-token distribution of the step before, or what is said.

    Options with names of `GateConfig`'s fields (`threshold`, `release`, `phrases`, `hold_tokens`) are set there; others come from
    `GateConfig(options={...})`, and reach `measures` as keywords.

    Attributes:
        options: name -> value where none is given. One that measures has `threshold` and `release`.
        measures: from logits `(rows, vocabulary)` to `(rows,)` float32.
        reads: from a `gating.Track` of the pass's tokens and the `GateConfig` to `(rows, queries)` in [0, 1]. A gate has one of
            the two.
        falls: what it measures is small where the model is uncertain, so that it opens below `threshold` and not above.
        bounds: in which `threshold` and `release` lie.
        zscore: `threshold` and `release` in standard deviations of what the row measured before, where they are not given;
            None where the gate cannot be asked for that.
    """

    options: Mapping[str, Any]
    measures: Callable[..., Tensor] | None = None
    reads: Callable[[Any, Any], Tensor] | None = None
    falls: bool = False
    bounds: tuple[float, float] = (0.0, 1.0)
    zscore: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if (self.measures is None) == (self.reads is None):
            raise ConfigError("a Gate measures distributions (measures=...) or reads tokens (reads=...); give one of the two.")
        if self.measures is not None and not {"threshold", "release"} <= set(self.options):
            raise ConfigError(
                "a Gate that measures has options 'threshold' and 'release', where it opens and closes; got "
                f"{sorted(self.options)}."
            )


@dataclass(frozen=True)
class Router:
    """A kind of aligner.

    Options with names of `AlignerConfig`'s fields are set there; others are in `AlignerConfig.options`.

    Attributes:
        build: from an `AlignerConfig`, the size of a feature and the number of layers to a module that steers
            `(..., features)`. Fresh, it should change nothing.
        options: name -> value where none is given.
        placements: where it may go: `"output"`, `"layers"`, `"projector"`.
        reads_text: the module is also handed the prompt's text, `(batch, text tokens, features)`, with `mask=` and `text_mask=`;
            only behind a projector.
        own_layers: it is built once for all layers, and handed the layer's number; others are built once per layer.
        routes: the module takes `return_routing=True` and then returns an `aligners.Routing`, too.
        refuse: why it cannot be built for features of a size, as a whole sentence; None where it can.
    """

    build: Callable[[Any, int, int], nn.Module]
    options: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    placements: tuple[str, ...] = ("output", "layers", "projector")
    reads_text: bool = False
    own_layers: bool = False
    routes: bool = True
    refuse: Callable[[Any, int], str | None] = lambda config, size: None

    def __post_init__(self) -> None:
        if self.reads_text and self.placements != ("projector",):
            raise ConfigError(
                f"a Router that reads text has placements=('projector',), where features meet the text; got {self.placements!r}."
            )
