"""The parts of one live model: its attention modules and layers, its ear or eye, and where all of them are."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_steer.errors import PatchError
from hf_steer.ground.additive import Additive


@dataclass(frozen=True)
class Site:
    """One attention module of the decoder or of the vision tower, or one layer of an encoder.

    Attributes:
        name: dotted path from the root model.
        module: the live module.
        index: its layer (decoder) or block (tower) number, from 0. A decoder's may have gaps: not every layer need attend.
        heads: query heads of a decoder's attention; 0 for others.
        key_value_heads: of its keys.
        slot: which layer of a cache holds its keys; None where that is not known.
        takes: the argument that a bias is added to, for modules that look no attention function up; None for others.
    """

    name: str
    module: nn.Module
    index: int
    heads: int = 0
    key_value_heads: int = 0
    slot: int | None = None
    takes: Additive | None = None


@dataclass(frozen=True)
class Encoder:
    """The ear or the eye of one live model, and where aligners can be put.

    Attributes:
        tower: the encoder.
        layers: those of its layers whose output matters.
        outlet: the module that hands the features on: the encoder itself, or the projector that reads them.
        reads: whether the features are the outlet's input (an LLaVA reads an inner hidden state) or its output.
        size: of a feature there.
        layer_size: of a feature between layers.
        projector: what maps features into the language model's space; None where nothing does.
        placeholder_ids: tokens that the features replace in the prompt.
        mask: the model's argument that says which mel frames or samples are real; None where there is none.
        projectors: all that map them, in the order of their calls.
        argument: of the outlet, in which the features come where they are its input; empty for the first.
        lacks: placement -> why no aligner can be put there.
        channels_first: whether the features are the second dimension of what the outlet reads, as before a convolution.
    """

    tower: Any
    layers: tuple[Site, ...]
    outlet: nn.Module
    reads: bool
    size: int
    layer_size: int
    projector: nn.Module | None
    placeholder_ids: tuple[int, ...]
    mask: str | None
    projectors: tuple[nn.Module, ...] = ()
    argument: str = ""
    lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    channels_first: bool = False


@dataclass(frozen=True)
class Anatomy:
    """Where things are in one live model: what structure, and a row of `registry.FAMILIES` if it has one, come to.

    `decoder` is None where no language model reads a prompt (CTC), for the `reason` that is given; `tower` without eyes whose
    attention can be read. `layers` attend to the prompt, `crosses` to what an encoder hands on; `carried` says how a bias
    reaches the one, `carried_across` the other (see `ground.structure`), and `left_out` which modules cannot be steered, and why.
    `layout` names the row of `saliency.LAYOUTS` that says where placeholder tokens lie, or is a function of that kind; None for a
    model that reads text only. `blocks` are those whose output matters; `arrangement` says how the model lays what they saw out
    as tokens (see `registry.Family`), and `class_tokens` how many of the tower's tokens come before its patches. `frame_seconds` is
    how much of a sound one position of what an encoder hands on stands for, where that is known. `no_encoder` says why a modality
    has no encoder.
    """

    family: str
    root: Any
    base: nn.Module
    decoder: Any
    layers: tuple[Site, ...]
    crosses: tuple[Site, ...]
    carried: str
    carried_across: str
    left_out: Mapping[str, str]
    reason: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    tower: Any
    blocks: tuple[Site, ...]
    placeholder_ids: Mapping[str, int]
    layout: str | Callable[..., Any] | tuple[str | Callable[..., Any], ...] | None
    merge_size: int
    patch_px: int
    temporal_patch_size: int
    windowed: bool
    arrangement: str | None
    class_tokens: int
    hidden_size: int
    encoders: Mapping[str, Encoder]
    frame_seconds: float | None = None
    attends: str = "self"

    @property
    def placed_across(self) -> tuple[str, ...]:
        """Modalities whose places are known among what an encoder hands on: the prompt has no tokens for them."""
        seen = ("image",) if self.layout is not None and not self.placeholder_ids else ()
        return seen if self.frame_seconds is None else (*seen, "audio")

    def across(self) -> Anatomy:
        """The same, with attention to what an encoder hands on as that which is steered."""
        heads = max((site.heads for site in self.crosses), default=0)
        return dataclasses.replace(self, layers=self.crosses, carried=self.carried_across, num_heads=heads, attends="cross")
    no_encoder: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Anatomy:
        """A copy with the model's, never without it: a part of the steering would then take all of the base along."""
        if id(self.root) not in memo:
            raise PatchError(
                "a part of a patched model cannot be copied by itself, since it would take the whole model along. PEFT does that "
                "for modules_to_save: leave 'hf_steer' (and the projector that an aligner is at) out of it. Call "
                "hf_steer.training.train_steering(model) after get_peft_model; the aligners are then trained, and saved with the "
                "adapter. For a projector there is SteerConfig(train_projector=True). For a copy of a part: unpatch_model first."
            )
        memo[id(self)] = copied = object.__new__(type(self))
        for name, value in vars(self).items():
            object.__setattr__(copied, name, copy.deepcopy(value, memo))
        return copied
