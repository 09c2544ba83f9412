"""`hf_steer.verify`: the contract on a user's own model, as it lies there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_steer.config import AttentionConfig, SteerConfig
from hf_steer.errors import ConfigError, PatchError
from hf_steer.families import resolve
from hf_steer.ground.arguments import Given
from hf_steer.ground.decoders import reads_encoder
from hf_steer.ground.parts import Anatomy
from hf_steer.patching import get_steer_status, make_plan, read_saliency, use_saliency
from hf_steer.patching.scopes import find_steering, scope_of
from hf_steer.saliency import Saliency
from hf_steer.testing.checking import check, evaluating, wanted
from hf_steer.testing.report import Check, facts_of
from hf_steer.testing.settled import settle
from hf_steer.testing.subject import random_saliency
from hf_steer.verify.counting import counted
from hf_steer.verify.crossing import gaze_across, said_across, with_words
from hf_steer.verify.prompts import check_inputs, short_prompts
from hf_steer.verify.report import Verification
from hf_steer.verify.rows import BUDGET, PROMISES
from hf_steer.verify.subjects import Counted, Standing


def verify(
    model: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    saliency: Saliency | None = None,
    config: SteerConfig | AttentionConfig | None = None,
    tokenizer: Any = None,
    only: Sequence[str] | None = None,
) -> Verification:
    """Verify hf_steer's promises on your own model, as it lies there: on its device, in its type, patched or not.

    Nothing of the model's size is copied or made, and afterwards the model is as it was, also after an error or Ctrl-C: state,
    hooks, training modes, what is trained, and the random numbers that come next. A patched model is verified with the patch that
    it has, which is lifted for two of the checks and put back: the same parameters, the same aligners. While it runs, no other
    thread may run the model.

    What must be equal is compared bit by bit. Where the same is computed in two ways, the bar is 4 times what lies between the
    unpatched model's own results in these two ways, and 1e-4 of the largest value (in half precision 8 epsilons of the type).
    Sampled heads of the first, middle and last steered layer, as they are computed in the model's own passes, are compared with
    float64, within 4 times what the unsteered heads are off, and 2 epsilons of their type plus half of one for each unit of the
    largest bias. It takes `hf_steer.verify.BUDGET` forward passes at most.

    Args:
        model: a transformers model, or a patched one, inside wrappers or not.
        inputs: of its forward pass, as its processor makes them: best two rows or more of unequal length, padded on the left, which
            end with text. None for two short prompts: of the tokenizer, or of random words.
        saliency: what steers. None for what is said around this call; or the model's own eyes, if the inputs hold a picture and the
            gaze follows them; else random scores.
        config: what is verified, of a model that is not patched; when None a gaze of all heads, each with a strength of its own,
            and an aligner in each place that the model has, if the inputs hold something for them.
        tokenizer: of the model, or its processor: makes the prompts, and is used as by `patch_model`.
        only: names of promises, of `hf_steer.verify.PROMISES`; all when None.

    Returns:
        The report; `print` it. It raises nothing for a broken promise: ask `report.holds`, or call `report.raise_if_broken()`.

    Raises:
        PatchError: no model that can be patched, or a patch that asks for nothing.
        ConfigError: promises that are not there; a configuration beside a patch; inputs that do not belong together.
        SaliencyError: saliency that does not fit the inputs.
    """
    names = wanted(only, PROMISES)
    steering = find_steering(model)
    anatomy: Anatomy = resolve(model) if steering is None else steering.plan.anatomy
    if isinstance(config, AttentionConfig):
        config = SteerConfig(attention=config)
    _refuse_nothing(anatomy)
    own = short_prompts(anatomy, tokenizer) if inputs is None else check_inputs(inputs)
    own = with_words(anatomy, own)
    begun, checks = time.monotonic(), []
    with evaluating(model), torch.no_grad(), counted(anatomy) as counter:
        if steering is None:
            subject = _fresh(model, own, anatomy, config, saliency, tokenizer)
        else:
            subject = _standing(model, own, anatomy, config, saliency, tokenizer)
        subject.changes()  # notes what the model is
        with tqdm(total=len(names), desc="verify", unit="check", leave=False, disable=None) as bar:
            for name in names:
                bar.set_postfix_str(name)
                checks.append(check(name, PROMISES[name], subject))
                bar.update()
    return _report(subject, checks, time.monotonic() - begun, counter.passes, counter.tokens)


def _refuse_nothing(anatomy: Anatomy) -> None:
    """PatchError for a model that takes neither a gaze nor aligners."""
    if anatomy.encoders or anatomy.layers or anatomy.crosses:
        return
    why = anatomy.reason or "; ".join(f"{name}: {left}" for name, left in anatomy.left_out.items())
    raise PatchError(
        f"there is nothing in this {anatomy.family!r} model that hf_steer could steer, so there is nothing to verify: {why}. See "
        "`hf-steer inspect`."
    )


def _fresh(
    model: Any, inputs: Mapping[str, Any], anatomy: Anatomy, config: SteerConfig | None, saliency: Saliency | None, tokenizer: Any
) -> Counted:
    """A model that is not patched, with what is to be patched."""
    given = Given(inputs)
    attention = None if config is None else config.attention
    if attention is not None and saliency is None and attention.saliency.source is not None and not given.perceives:
        saliency = random_saliency(given, seed=0)  # its eyes have nothing to see
    if config is not None and attention is None and not config.aligners:
        raise ConfigError("this configuration asks for nothing, neither attention nor aligners, so there is nothing to verify.")
    if config is None and anatomy.crosses and reads_encoder(anatomy.root):
        config = gaze_across(anatomy)
    if config is not None and config.attention is not None and config.attention.attends == "cross":
        if saliency is None:
            saliency = said_across(model, anatomy, inputs)
        across = make_plan(model, config, tokenizer).anatomy
        return Counted(model, inputs, across, config, saliency, tokenizer, copies=False, thorough=False)
    settled, said = settle(model, inputs, anatomy, config=config, saliency=saliency)
    if config is None and not given.perceives:
        settled = dataclasses.replace(settled, aligners=())
    return Counted(model, inputs, anatomy, settled, said, tokenizer, copies=False, thorough=False)


def _standing(
    model: Any, inputs: Mapping[str, Any], anatomy: Anatomy, config: SteerConfig | None, saliency: Saliency | None, tokenizer: Any
) -> Standing:
    """A model that is patched, with what it is patched with."""
    if config is not None:
        raise ConfigError(
            "this model is patched already, and its own patch is what is verified. Leave config= out, or take the patch back "
            "first: hf_steer.unpatch_model(model)."
        )
    steering = find_steering(model)
    plan = steering.plan  # type: ignore[union-attr]
    said, given = saliency or scope_of(steering).saliency, Given(inputs)
    if plan.config.attention is not None and plan.strengths:
        across = plan.config.attention.attends == "cross"
        if said is None and across:
            said = said_across(model, anatomy, inputs)
        elif said is None and not (plan.sees and given.perceives):
            said = random_saliency(given, seed=0)
        elif saliency is not None and not across:
            read_saliency(model, inputs, given=saliency)
    status = get_steer_status(model)
    if said is not None and plan.config.attention is not None:
        with use_saliency(model, said):
            status = get_steer_status(model)
    if not status.steers:
        raise PatchError(
            f"this model is patched, and its patch would do nothing here: {status.why}. There is nothing to verify; patch it with "
            "something that acts, or verify it unpatched: hf_steer.unpatch_model(model)."
        )
    return Standing(model, inputs, anatomy, plan.config, said, tokenizer, copies=False, thorough=False)


def _report(subject: Counted, checks: Sequence[Check], seconds: float, passes: int, tokens: int) -> Verification:
    return Verification(
        **facts_of(subject.anatomy),
        patched=isinstance(subject, Standing),
        seconds=round(seconds, 3),
        passes=passes,
        tokens=tokens,
        budget=BUDGET,
        checks=tuple(checks),
    )
