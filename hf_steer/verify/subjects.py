"""The model under verification: what was computed once is remembered, and a patch that is there already stays what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_steer.config import SteerConfig
from hf_steer.errors import ConfigError
from hf_steer.patching import disable_steering, make_plan, patch_model, probe_attention, unpatch_model
from hf_steer.patching.lifted import lifted
from hf_steer.patching.scopes import steering_of
from hf_steer.saliency import Saliency
from hf_steer.testing.prompts import mask_of
from hf_steer.testing.state import State, state_of
from hf_steer.testing.subject import Subject
from hf_steer.verify.sampling import Sampler

LAYERS, HEADS = 3, 2
"""That are sampled, and in each layer."""
PLAIN, STEERED, OTHERWISE = "plain", "steered", "otherwise"
"""How the model is now: unsteered, with the gaze that is verified, or patched in some other way."""


@dataclass
class Memory:
    """What changes while a model is verified.

    Attributes:
        now: `PLAIN`, `STEERED` or `OTHERWISE`.
        known: what was computed: (how the model was, what) -> result.
        samplers: how the model was -> what its heads did in the prompt and in the steps after it.
    """

    now: str = PLAIN
    known: dict[tuple[str, str], Any] = field(default_factory=dict)
    samplers: dict[str, Sampler] = field(default_factory=dict)


@dataclass(frozen=True)
class Counted(Subject):
    """A model that is not patched: a patch is made for each check. The prompt and its answer are computed once, plain and steered.

    Attributes:
        memory: of what was computed.
    """

    memory: Memory = field(default_factory=Memory)

    @property
    def root(self) -> Any:
        """The model inside of all wrappers."""
        return self.anatomy.root

    @cached_property
    def before(self) -> State:
        """As of `Subject`; also of a model that cannot generate from these inputs."""
        try:
            _ = self.plain, None if self.config.attention is None else self.plain_steps
        except Exception as error:  # a model may fail in any way; what needs its words says so
            if (PLAIN, "prompt") not in self.memory.known:
                why = f"{type(error).__name__}: {error}"
                raise ConfigError(f"the model itself fails on these inputs, unsteered ({why}).") from error
        return state_of(self.model)

    @cached_property
    def strengths(self) -> Mapping[int, tuple[float, ...]]:
        """Layer -> λ per query head of the gaze."""
        return make_plan(self.root, self.gaze, self.tokenizer).strengths

    @contextmanager
    def patched(self, config: SteerConfig) -> Iterator[Any]:
        """The model, patched inside the block."""
        with super().patched(config) as model, self._being(STEERED if config == self.gaze else OTHERWISE):
            yield model

    @contextmanager
    def gaze_alone(self) -> Iterator[Any]:
        """The model, patched with the gaze and no aligners."""
        with self.patched(self.gaze) as model:
            yield model

    @contextmanager
    def without_patch(self) -> Iterator[Any]:
        """The model, not patched: as it is after a patch, and a pass with it, were taken back."""
        with self.patched(self.gaze if self.config.attention is not None else self.config):
            self.anew(self.said)
        yield self.root

    @contextmanager
    def repatched(self, config: SteerConfig) -> Iterator[Any]:
        """The model, patched afresh with what a file says."""
        with super().patched(config) as model, self._being(OTHERWISE):
            yield model

    def wake(self) -> None:
        """Let fresh parameters of a patch that was made for a check be far from fresh."""
        self.stir()

    @contextmanager
    def _being(self, how: str) -> Iterator[None]:
        before, self.memory.now = self.memory.now, how
        try:
            yield
        finally:
            self.memory.now = before

    def _switched(self) -> AbstractContextManager[Any]:
        """Around each call."""
        return nullcontext()

    def anew(self, said: Saliency | None = None) -> Tensor:
        """Logits of the prompt, of a pass of its own."""
        with self._switched():
            return Subject.logits(self, said)

    def anew_plain(self) -> Tensor:
        """Logits of the prompt, unsteered, of a pass of its own."""
        with self._being(PLAIN):
            return self.anew()

    def mask_row(self, row: int) -> Tensor:
        """`(tokens,)`: 1 for the real ones of a row; of what an encoder hands on nothing is said of others."""
        if self.attention.attends == "cross":
            return torch.ones(1, dtype=torch.float64)
        return mask_of(self)[row].cpu().double()

    def logits(self, said: Saliency | None = None, inputs: Mapping[str, Any] | None = None, model: Any = None) -> Tensor:
        """Of one forward pass; of the prompt itself, plain and steered, once."""
        if inputs is None and self.memory.now != OTHERWISE:
            key = (self.memory.now, "prompt")
            if key not in self.memory.known:
                self.memory.known[key] = self.anew(said)
            return self.memory.known[key]  # type: ignore[no-any-return]
        with self._switched():
            return super().logits(said, inputs)

    def generate(self, said: Saliency | None = None, **how: Any) -> Any:
        """As of `Subject`; without further options once, plain and steered, and some heads are watched meanwhile."""
        if how or self.memory.now == OTHERWISE:
            with self._switched():
                return super().generate(said, **how)
        key = (self.memory.now, "answer")
        if key not in self.memory.known:
            sampler = Sampler(self.sampled, self.sampled_rows)
            with probe_attention(self.model, sampler.read, sites=self.anatomy.layers), self._switched():
                self.memory.known[key] = super().generate(said)
            self.memory.samplers[self.memory.now] = sampler
        return self.memory.known[key]

    @cached_property
    def sampled(self) -> dict[int, tuple[int, ...]]:
        """Layer -> heads that are compared with float64: the first, middle and last of the steered layers, two heads in each."""
        layers = sorted(self.strengths)
        places = torch.linspace(0, len(layers) - 1, min(LAYERS, len(layers))).round().long().tolist()
        generator = torch.Generator().manual_seed(0)
        chosen = {}
        for layer in dict.fromkeys(layers[place] for place in places):
            steered = [head for head, value in enumerate(self.strengths[layer]) if value]
            drawn = torch.randperm(len(steered), generator=generator)[:HEADS].tolist()
            chosen[layer] = tuple(sorted(steered[number] for number in drawn))
        return chosen

    @property
    def sampled_rows(self) -> tuple[int, ...]:
        """The first and the last."""
        rows = 1 if self.given.source is None else int(self.given.source.shape[0])
        return tuple(sorted({0, rows - 1}))


@dataclass(frozen=True)
class Standing(Counted):
    """A model that is patched already: it is unsteered where steering is off, and steered by the very patch that it has."""

    @contextmanager
    def patched(self, config: SteerConfig) -> Iterator[Any]:
        """Steered by its own patch, where that is what is asked for; else the patch is lifted for another."""
        if config in (self.gaze_or_none, self.config):
            with self._being(STEERED):
                yield self.model
        else:
            with self.repatched(config) as model:
                yield model

    @property
    def gaze_or_none(self) -> SteerConfig | None:
        """Its gaze alone, if it has one."""
        return None if self.config.attention is None else self.gaze

    @property
    def strengths(self) -> Mapping[int, tuple[float, ...]]:
        """Layer -> λ per query head of the gaze, as planned."""
        return steering_of(self.model).plan.strengths  # type: ignore[no-any-return]

    @contextmanager
    def gaze_alone(self) -> Iterator[Any]:
        """As it is; where it has aligners, which act whatever λ is, a patch with its gaze alone stands in for it."""
        if not self.config.aligners:
            with self._being(OTHERWISE):
                yield self.model
        else:
            with self.repatched(self.gaze) as model:
                yield model

    @contextmanager
    def without_patch(self) -> Iterator[Any]:
        """The model, with its patch lifted."""
        with lifted(self.model) as root, self._being(OTHERWISE):
            yield root

    @contextmanager
    def repatched(self, config: SteerConfig) -> Iterator[Any]:
        """The model, its patch lifted, and patched afresh."""
        with self.without_patch() as root:
            try:
                yield patch_model(root, config, tokenizer=self.tokenizer)
            finally:
                unpatch_model(root)

    def wake(self) -> None:
        """What it has learned stays."""

    def clear(self) -> None:
        """Its patch stays."""

    def _switched(self) -> AbstractContextManager[Any]:
        return disable_steering(self.model) if self.memory.now == PLAIN else nullcontext()
