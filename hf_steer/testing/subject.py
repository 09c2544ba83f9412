"""The model that is checked, what it is called with, and what steers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_steer.config import AttentionConfig, SteerConfig
from hf_steer.ground.arguments import Given
from hf_steer.ground.outputs import logits_in
from hf_steer.ground.parts import Anatomy
from hf_steer.patching import get_steer_status, patch_model, unpatch_model, use_saliency
from hf_steer.patching.scopes import steering_of
from hf_steer.saliency import Saliency
from hf_steer.testing.report import CannotShow, Finding
from hf_steer.testing.state import State, changes_between, state_of

NEW_TOKENS = 3
"""That each `generate` makes."""


@dataclass(frozen=True)
class Subject:
    """One model on one batch.

    Attributes:
        model: not patched, in eval mode.
        inputs: of its forward pass.
        anatomy: of the model.
        config: all that is checked.
        said: what steers its gaze; None for its own eyes.
        tokenizer: as for `patch_model`.
        copies: whether the model may be copied.
        thorough: whether the same may be computed in several ways where one shows it.
    """

    model: Any
    inputs: Mapping[str, Any]
    anatomy: Anatomy
    config: SteerConfig
    said: Saliency | None
    tokenizer: Any = None
    copies: bool = True
    thorough: bool = True

    @property
    def given(self) -> Given:
        """The inputs by our words."""
        return Given(self.inputs)

    @property
    def attention(self) -> AttentionConfig:
        """The gaze; CannotShow for a configuration without one."""
        if self.config.attention is None:
            reads = self.anatomy.decoder is not None
            raise CannotShow("no gaze was asked for" if reads else "the model has no language model that reads a prompt")
        return self.config.attention

    @property
    def gaze(self) -> SteerConfig:
        """The gaze alone."""
        return SteerConfig(attention=self.attention)

    @property
    def silent(self) -> SteerConfig:
        """The gaze, steered by nothing but what is said."""
        saliency = dataclasses.replace(
            self.attention.saliency, source=None, blocks=None, source_heads=None, last_tokens=None, answer_token=None
        )
        return SteerConfig(attention=dataclasses.replace(self.attention, saliency=saliency))

    @property
    def aligned(self) -> SteerConfig:
        """The aligners alone; CannotShow without any, and for inputs in which there is nothing for them."""
        if not self.config.aligners:
            raise CannotShow("no aligners were asked for" if self.anatomy.encoders else "the model has no encoder")
        if not self.given.perceives:
            raise CannotShow("there is no picture, video or sound in the inputs")
        return dataclasses.replace(self.config, attention=None)

    @cached_property
    def plain(self) -> Tensor:
        """Logits of the unpatched model."""
        return self.logits()

    @cached_property
    def plain_steps(self) -> Tensor:
        """Logits of each token that the unpatched model generates."""
        return steps_of(self.generate())

    @cached_property
    def before(self) -> State:
        """The unpatched model's state. What transformers makes at a first call is there already."""
        _ = self.plain, None if self.config.attention is None else self.plain_steps
        return state_of(self.model)

    @property
    def real(self) -> Tensor | None:
        """`(batch, tokens)` bool, False for padding; None where the logits are not those of prompt tokens, or all are real."""
        mask, ids = self.given.mask, self.given.ids
        return mask.bool() if ids is not None and isinstance(mask, Tensor) and mask.shape == ids.shape else None

    def of_real(self, logits: Tensor) -> Tensor:
        """Those of tokens that are no padding."""
        return logits if self.real is None or self.real.shape != logits.shape[:2] else logits[self.real]

    @contextmanager
    def patched(self, config: SteerConfig) -> Iterator[Any]:
        """The model, patched inside the block."""
        try:
            yield patch_model(self.model, config, tokenizer=self.tokenizer)
        finally:
            self.clear()

    def clear(self) -> None:
        """Take back a patch that is still there."""
        if get_steer_status(self.model).patched:
            unpatch_model(self.model)

    def changes(self) -> list[str]:
        """What is not as it was before the checks."""
        return changes_between(self.before, state_of(self.model))

    def looking(self, said: Saliency | None) -> AbstractContextManager[Any]:
        """A block in which this is said."""
        return nullcontext() if said is None else use_saliency(self.model, said)

    @torch.no_grad()
    def logits(self, said: Saliency | None = None, inputs: Mapping[str, Any] | None = None, model: Any = None) -> Tensor:
        """Of one forward pass."""
        with self.looking(said):
            return logits_in((model or self.model)(**(self.inputs if inputs is None else inputs))).detach()

    def anew(self, said: Saliency | None = None) -> Tensor:
        """Logits of the prompt, of a pass of its own, also where results are remembered."""
        return self.logits(said)

    def generate(self, said: Saliency | None = None, **how: Any) -> Any:
        """What `generate` gives, greedily, with raw logits."""
        if self.config.attention is None:
            raise CannotShow("models that read no prompt generate in ways of their own")
        with self.looking(said):
            return self.model.generate(
                **self.inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.0,
                return_dict_in_generate=True, output_logits=True, **how,
            )  # fmt: skip

    def stir(self) -> None:
        """Let what a patched model has to learn be far from fresh."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in steering_of(self.model).parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)

    def tokens_said(self, seed: int) -> Saliency:
        """One random score for each real token of the prompt."""
        return random_saliency(self.given, seed)


def random_saliency(given: Given, seed: int) -> Saliency:
    """One random score for each real token of the prompt."""
    if not isinstance(given.ids, Tensor):
        raise CannotShow("the inputs hold no token numbers")
    scores = torch.randn(given.ids.shape, generator=torch.Generator().manual_seed(seed))
    if isinstance(given.mask, Tensor) and given.mask.shape == given.ids.shape:
        scores = scores * given.mask.cpu().bool()
    return Saliency.from_tokens(scores)


def steps_of(out: Any) -> Tensor:
    """Logits of each new token in what `generate` gives: `(batch, new tokens, vocabulary)`."""
    return torch.stack(out.logits, 1)


def equal(found: Tensor, expected: Tensor, what: str = "") -> Finding:
    """Bit by bit."""
    if found.shape != expected.shape:
        return Finding(False, note=f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}".removeprefix(": "))
    same = torch.equal(found, expected)
    return Finding(same, largest(found - expected), 0.0, "" if same else what)


def largest(values: Tensor) -> float:
    """The largest magnitude; NaN where one is."""
    return float(values.detach().float().abs().amax()) if values.numel() else 0.0


def all_of(*findings: Finding) -> Finding:
    """The first that is broken, or else the one that is nearest to its bar."""
    broken = [finding for finding in findings if not finding.holds]
    return broken[0] if broken else max(findings, key=lambda own: (own.error or 0.0) / (own.bar or 1.0))
