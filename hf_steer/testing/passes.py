"""What is promised of one steered forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_steer.attention import SteeredCall
from hf_steer.config import AttentionConfig, SteerConfig
from hf_steer.errors import ConfigError, SaliencyError, SteerError
from hf_steer.ground.parts import Site
from hf_steer.patching import make_plan
from hf_steer.patching.edits import AddHook
from hf_steer.saliency import Saliency
from hf_steer.testing.compared import as_close_as_plain, bar_for
from hf_steer.testing.prompts import ids_of, padded, shifted, with_other_end
from hf_steer.testing.report import CannotShow, Finding
from hf_steer.testing.subject import Subject, equal, largest

PADDING = 3
"""Tokens that are put before each row."""


def zero_strength(subject: Subject) -> Finding:
    """With λ = 0 in every head."""
    with subject.patched(SteerConfig(attention=dataclasses.replace(subject.attention, heads="all", strength=0.0))):
        return equal(subject.logits(subject.said), subject.plain)


def changed(subject: Subject) -> Finding:
    """Or nothing else here would show anything."""
    with subject.patched(subject.gaze):
        found = subject.logits(subject.said)
    change, least = largest(subject.of_real(found - subject.plain)), bar_for(subject, subject.plain, 0.0)
    return Finding(change > least, note=f"largest change of a logit {change:.3g}; rounding makes up to {least:.3g}")


def padding(subject: Subject) -> Finding:
    """More padding on the left."""
    longer = padded(subject, PADDING)

    def ways(said: Saliency | None) -> tuple[Tensor, Tensor]:
        found = subject.logits(shifted(subject, said, before=PADDING), longer)[:, PADDING:]
        return subject.of_real(found), subject.of_real(subject.logits(said))

    return as_close_as_plain(subject, ways, config=subject.gaze, said=subject.said)


def no_leak(subject: Subject) -> Finding:
    """Another last token."""
    if subject.attention.saliency.reads_prompt and subject.said is None:
        raise CannotShow("its saliency is read from the whole prompt, the last token included")
    other = with_other_end(subject)

    def ways(said: Saliency | None) -> tuple[Tensor, Tensor]:
        return _earlier(subject, subject.logits(said, other)), _earlier(subject, subject.logits(said))

    return as_close_as_plain(subject, ways, config=subject.gaze, said=subject.said, exact=True)


def _earlier(subject: Subject, logits: Tensor) -> Tensor:
    """Of all real tokens but the last."""
    earlier = logits[:, :-1]
    return earlier if subject.real is None else earlier[subject.real[:, :-1]]


def partial_match(subject: Subject) -> Finding:
    """A head, a layer and a score too many."""
    if subject.silent.attention is None:
        raise CannotShow("no gaze was asked for")
    first, last = subject.anatomy.layers[0], subject.anatomy.layers[-1]
    asked: tuple[Any, ...] = ({first.index: (first.heads,)}, {last.index + 1: "all"})
    for wrong in asked:
        attention = AttentionConfig(heads=wrong, saliency=subject.silent.attention.saliency)
        try:
            with subject.patched(SteerConfig(attention=attention)):
                return Finding(False, note=f"heads {wrong} were taken; the first layer has {first.heads}, the last is {last.index}")
        except ConfigError:
            continue
    rows, tokens = ids_of(subject).shape
    with subject.patched(subject.silent):
        try:
            subject.logits(Saliency.from_tokens(torch.ones(rows, tokens + 1)))
        except SaliencyError:
            return Finding(True)
    return Finding(False, note=f"{tokens + 1} scores were taken for a prompt of {tokens} tokens")


def applied(subject: Subject) -> Finding:
    """Each steered layer in turn gets no bias handed to it: that is said, or it is applied all the same."""
    strengths = make_plan(subject.model, subject.gaze, subject.tokenizer).strengths
    return applied_in(subject, [site for site in subject.anatomy.layers if site.index in strengths])


def applied_in(subject: Subject, sites: Sequence[Site]) -> Finding:
    """The same for some of the steered layers."""
    with subject.patched(subject.gaze):
        expected = subject.logits(subject.said)
        for site in sites:
            with AddHook(site.module, "before", _without_bias):
                try:
                    found = subject.anew(subject.said)
                except SteerError:
                    continue
            if not torch.equal(found, expected):
                return Finding(False, note=f"layer {site.index} lost its bias, and no error said so")
    return Finding(True, note=f"{len(sites)} layers")


def _without_bias(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args, {name: value for name, value in kwargs.items() if not isinstance(value, SteeredCall)}
