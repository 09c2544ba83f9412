"""The gaze: which heads are biased towards what, and how hard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from hf_steer.config.checks import (
    Heads,
    Strength,
    check_choice,
    check_count,
    check_flag,
    check_heads,
    check_indices,
    check_number,
    check_schedule,
    check_strength,
    check_tags,
    plain,
)
from hf_steer.config.gate import GateConfig
from hf_steer.config.manners import AUTO as AUTO
from hf_steer.config.manners import MANNERS, Manner
from hf_steer.config.options import fill_options
from hf_steer.errors import ConfigError, shown
from hf_steer.registry import BACKENDS, SOURCES, Source

NORMALIZATIONS = (AUTO, "zscore", "minmax", "maxabs", "rank", "none")
PHASES = ("prompt", "thinking", "answer")
QUERIES: Mapping[str, tuple[float, float, float]] = {
    "all": (1.0, 1.0, 1.0),
    "generated": (0.0, 1.0, 1.0),
    "thinking": (0.0, 1.0, 0.0),
    "answer": (0.0, 0.0, 1.0),
}
"""Name of a scope -> what it multiplies λ with in each of `PHASES`."""
ATTENDS = ("self", "cross")
TRAINABLE = "trainable"
OPTIONS = ("source_heads", "last_tokens", "answer_token")
"""Options of sources that have a field; which of them a source has, its row of `registry.SOURCES` says."""


@dataclass(frozen=True)
class SaliencyConfig:
    """Where the score of each token comes from, and how it is scaled.

    Args:
        source: `"vision_attention"` reads the model's own eyes: the attention that each patch receives in the vision
            tower. `"vision_rollout"` follows that attention through the blocks, residual connections included
            (https://arxiv.org/abs/2005.00928). Of the prompt as the decoder gets it: `"feature_norm"`, the length of each picture
            or sound token; `"text_similarity"`, its mean cosine with the text; `"decoder_attention"`, what `source_heads` look
            at from the last `last_tokens` of the prompt in a first, unsteered pass; `"gradient"`, gradient × input of
            `answer_token`'s logit, also in a first pass. Others that plugins or `register_source` have added. None takes only
            what `use_saliency` supplies.
        normalize: per picture, per video frame, or over the row's real tokens for token scores. `"maxabs"` divides by the largest
            absolute score of the row, so that what is pointed at most scores 1 and what is not mentioned 0; `"zscore"` is clipped
            at `clip`, and a few far outliers do not set its scale (see `hf_steer.saliency.normalize`); `"minmax"` and
            `"rank"` give [0, 1]; constant scores become zeros under these three. `"none"` uses the scores as they are. `"auto"`:
            `"zscore"` for what a source sees by itself, `"maxabs"` for what is said.
        clip: largest absolute z-score, above 0. Two outlier patches would otherwise take most of the bias.
        blocks: vision blocks to read, or `"all"`; negative counts from the last whose output the model reads. Several
            are averaged, or rolled out. None: the last for `"vision_attention"`, all for `"vision_rollout"`.
        preserve_mass: subtract `log mean exp(λs)` over each group, so that the bias moves attention *within* a picture
            rather than towards it. Exact where the unsteered attention inside the picture is uniform; a schedule or a soft
            gate scales bias and correction together. None: for pictures and sounds, and not for scores of text.
        source_heads: for `"decoder_attention"`: `"all"` or `{layer: heads}`; the steered heads when None.
        last_tokens: for `"decoder_attention"`: how many of the prompt's last tokens look; 1 when None.
        answer_token: for `"gradient"`: a token id; when None the likeliest next token of each row.
        options: those of a source that somebody else added, and for which there is no field.
    """

    source: str | None = "vision_attention"
    normalize: Literal["auto", "zscore", "minmax", "maxabs", "rank", "none"] = "auto"
    clip: float = 3.0
    blocks: tuple[int, ...] | Literal["all"] | None = None
    preserve_mass: bool | None = None
    source_heads: Heads | None = None
    last_tokens: int | None = None
    answer_token: int | None = None
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        row = None
        if self.source is not None:
            row = SOURCES.find(self.source, "saliency.source must be one of {known}; got {got}{near}.", besides=(None,))
        fill_options(self, f"saliency source {self.source!r}", {} if row is None else row.options, OPTIONS)
        check_choice("saliency.normalize", self.normalize, NORMALIZATIONS)
        object.__setattr__(self, "clip", check_number("saliency.clip", self.clip))
        if self.clip <= 0:
            raise ConfigError(f"saliency.clip must be above 0; got {self.clip}. The default is 3.0.")
        if self.preserve_mass is not None:
            check_flag("saliency.preserve_mass", self.preserve_mass)
        if self.blocks is not None and not (isinstance(self.blocks, str) and self.blocks == "all"):
            one = plain(self.blocks)
            blocks = (one,) if isinstance(one, int) else self.blocks
            object.__setattr__(self, "blocks", check_indices("saliency.blocks", blocks, signed=True))
        if self.source_heads is not None:
            object.__setattr__(self, "source_heads", check_heads(self.source_heads, "saliency.source_heads"))
        if self.last_tokens is not None:
            object.__setattr__(self, "last_tokens", check_count("saliency.last_tokens", self.last_tokens))
        if self.answer_token is not None:
            token = plain(self.answer_token)
            if isinstance(token, bool) or not isinstance(token, int) or abs(token) > 2**31:
                raise ConfigError(f"saliency.answer_token must be a token id; got {shown(self.answer_token)}.")
            object.__setattr__(self, "answer_token", token)

    @property
    def row(self) -> Source | None:
        """What the table knows of its source; None where only the user says where to look."""
        return None if self.source is None else SOURCES[self.source]

    @property
    def reads_prompt(self) -> bool:
        """Whether the scores come from the prompt as the decoder gets it."""
        return self.row is not None and self.row.prompt is not None


@dataclass(frozen=True)
class AttentionConfig:
    """Which heads are biased towards salient tokens, how hard, and for which queries.

    The bias is `λ_h · s_k`, added to the attention logits: `softmax(q·kᵀ/√d + λ_h·s_k)`.

    Args:
        heads: `"all"`, or `{layer: heads}` with a tuple of query heads or `"all"`. Layers count from 0; negative
            layers count from the last.
        strength: λ. One number, `{layer: number}`, or `{layer: {head: number}}`. Negative turns the gaze away. `"trainable"`:
            one parameter per head, 0 at first, learned by ordinary training. `"auto"`: by what is said, see
            `config.manners.MANNERS`.
        saliency: where the scores come from; the name of a source alone is taken, too.
        queries: `"auto"`: `"generated"` for scores of text, which leave the reading of the prompt alone, and `"all"` otherwise.
            `"all"`; `"generated"`: only queries out of which a token is generated, the prompt's last token included (the
            first new token comes out of it); `"thinking"` and `"answer"`: of these, the ones inside or after the thinking
            text. In a training step the generated ones are the positions before a label.
        schedule: factors on λ by phase instead, such as `{"prompt": 0.5, "thinking": 1.0, "answer": 0.0}`; 1 where none is
            given.
        gate: steer only while the row is uncertain; the kind of a gate alone is taken, too. None steers always.
        think_tags: what opens and closes the thinking text, in the prompt or in what is generated; the last one counts.
        share: of attention, in (0, 1), that what is pointed at shall have in each steered head and query, instead of a strength:
            where it has less, its logits are raised by just what is missing, and where it has as much nothing is done. A schedule's
            factor and a gate, both from 0 to 1, multiply the share: half open keeps half of it. What is pointed at are the tokens
            with more than half of the largest score. Costs a second look at the keys; `eager`, `sdpa`
            and `flex_attention` have it.
        attends: what the biased attention looks at: `"self"`, the prompt and what was generated; `"cross"`, what an encoder hands
            on, in decoders that read it by cross-attention (Whisper, BART, T5): scores are then of its positions, and seconds
            of a sound fall on them. Only the user says where: `SaliencyConfig(source=None)`.
        backend: how the bias is carried; all give the same result. `"auto"` takes what is cheapest for the device, the phase and
            the attention implementation. `"folded"`: channels of the head dimension; `"mask"`: added to the mask;
            `"cpu_flash"`: a row inside the CPU's flash kernel; `"flex"`: computed inside FlexAttention; `"triton"`: added inside
            a flash attention kernel of hf_steer's own, on GPUs; or one that plugins or `register_backend` have added. One that
            cannot carry a call gives way, and that is said once.
    """

    heads: Heads = "all"
    strength: Strength | Literal["auto", "trainable"] = AUTO
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    queries: Literal["auto", "all", "generated", "thinking", "answer"] = AUTO
    backend: str = AUTO
    schedule: Mapping[str, float] | None = None
    gate: GateConfig | None = None
    think_tags: tuple[str, str] = ("<think>", "</think>")
    attends: Literal["self", "cross"] = "self"
    share: float | None = None

    if TYPE_CHECKING:  # two fields take more than they hold

        def __init__(
            self,
            heads: Heads = "all",
            strength: Strength | Literal["auto", "trainable"] = AUTO,
            saliency: SaliencyConfig | str = ...,
            queries: Literal["auto", "all", "generated", "thinking", "answer"] = AUTO,
            backend: str = AUTO,
            schedule: Mapping[str, float] | None = None,
            gate: GateConfig | str | None = None,
            think_tags: tuple[str, str] = ("<think>", "</think>"),
            attends: Literal["self", "cross"] = "self",
            share: float | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        check_choice("attention.queries", self.queries, (AUTO, *QUERIES))
        if not (isinstance(self.backend, str) and self.backend == AUTO):
            BACKENDS.find(self.backend, "attention.backend must be one of {known}; got {got}{near}.", besides=(AUTO,))
        if isinstance(self.saliency, str):
            object.__setattr__(self, "saliency", SaliencyConfig(source=self.saliency))
        if isinstance(self.gate, str):
            object.__setattr__(self, "gate", GateConfig(kind=self.gate))
        if not isinstance(self.saliency, SaliencyConfig):
            raise ConfigError(f"attention.saliency must be a SaliencyConfig; got {type(self.saliency).__name__}.")
        object.__setattr__(self, "heads", check_heads(self.heads))
        if not (isinstance(self.strength, str) and self.strength in (AUTO, TRAINABLE)):
            object.__setattr__(self, "strength", check_strength(self.strength))
        if self.gate is not None and not isinstance(self.gate, GateConfig):
            raise ConfigError(f"attention.gate must be a GateConfig or None; got {type(self.gate).__name__}.")
        object.__setattr__(self, "schedule", check_schedule(self.schedule, PHASES))
        object.__setattr__(self, "think_tags", check_tags(self.think_tags))
        if self.schedule is not None and self.queries not in (AUTO, "all"):
            raise ConfigError(f"queries={self.queries!r} and a schedule both say which phases are steered; leave queries out.")
        check_choice("attention.attends", self.attends, ATTENDS)
        if self.attends == "cross" and self.saliency.source is not None:
            raise ConfigError(
                f"attention.attends='cross' looks at what an encoder hands on, of which source {self.saliency.source!r} knows "
                "nothing; set saliency=SaliencyConfig(source=None), and say where with use_saliency(model, "
                "Saliency.from_seconds(...)) or Saliency.from_tokens(...), one score per position of the encoder."
            )
        self._refuse_strength_elsewhere()
        if self.share is not None:
            object.__setattr__(self, "share", self._checked_share())

    def _checked_share(self) -> float:
        share = float(check_number("attention.share", self.share))
        if not 0 < share < 1:
            raise ConfigError(f"attention.share is a share of attention, above 0 and below 1; got {share}. Try 0.3.")
        if self.strength != AUTO:
            raise ConfigError(f"attention.share and strength={shown(self.strength)} both say how hard; leave strength out.")
        if self.saliency.preserve_mass:
            raise ConfigError("attention.share moves attention to a span, which preserve_mass=True forbids; leave it out.")
        beyond = {phase: factor for phase, factor in (self.schedule or {}).items() if not 0 <= factor <= 1}
        if beyond:
            raise ConfigError(
                f"with attention.share a schedule says which part of the share each phase keeps, from 0 to 1; got {shown(beyond)}. "
                "Set the largest as share."
            )
        return share

    @property
    def phase_factors(self) -> tuple[float, float, float]:
        """What multiplies λ in each of `PHASES`, where the kind of statement does not matter."""
        if self.schedule is None:
            return QUERIES["all" if self.queries == AUTO else self.queries]
        prompt, thinking, answer = (self.schedule.get(phase, 1.0) for phase in PHASES)
        return prompt, thinking, answer

    def manner(self, kind: str) -> Manner:
        """How a kind of statement, a key of `MANNERS`, is put into effect: as configured, or else as is usual for it."""
        usual, saliency = MANNERS[kind], self.saliency
        if self.share is not None:
            usual = replace(usual, normalize="rank" if kind == "source" else usual.normalize, preserve_mass=False)
        return Manner(
            usual.normalize if saliency.normalize == AUTO else saliency.normalize,
            usual.preserve_mass if saliency.preserve_mass is None else saliency.preserve_mass,
            usual.strength if self.strength == AUTO else 1.0,
            usual.queries if self.queries == AUTO else self.queries,
        )

    def spelled(self, kind: str) -> AttentionConfig:
        """The same for one kind of statement, with nothing left open."""
        manner = self.manner(kind)
        scaled: dict[str, Any] = {"normalize": manner.normalize, "preserve_mass": manner.preserve_mass}
        saliency = replace(self.saliency, **scaled)
        own: dict[str, Any] = {"saliency": saliency}
        if self.strength == AUTO and self.share is None:
            own["strength"] = manner.strength
        if self.schedule is None and self.attends == "self":
            own["queries"] = manner.queries
        return replace(self, **own)

    def phases(self, kind: str) -> tuple[float, float, float]:
        """What multiplies λ in each of `PHASES` for a kind of statement, a key of `MANNERS`."""
        if self.queries == AUTO and self.schedule is None and self.attends == "self":
            return QUERIES[MANNERS[kind].queries]
        return self.phase_factors

    @property
    def reads_tokens(self) -> bool:
        """Whether what is said matters to when it steers: the think tags, or phrases."""
        _, thinking, answer = self.phase_factors
        return thinking != answer or (self.gate is not None and self.gate.row.reads is not None)

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
