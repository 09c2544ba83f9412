"""What is promised of a steered `generate`."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from hf_steer.ground.arguments import named
from hf_steer.saliency import Saliency
from hf_steer.testing.compared import as_close_as_plain
from hf_steer.testing.prompts import continued, shifted
from hf_steer.testing.report import CannotShow, Finding
from hf_steer.testing.subject import NEW_TOKENS, Subject, all_of, equal, steps_of

BEAMS = 3
THREADS = 3


def decoding(subject: Subject) -> Finding:
    """Prompt, then token by token on a cache, against no cache, and against one pass over prompt and answer where that can be."""
    at_once = _why_not_at_once(subject) is None

    def ways(said: Saliency | None) -> tuple[Tensor, Tensor]:
        out = subject.generate(said)
        others = [steps_of(subject.generate(said, **named(keeps_cache=False)))]
        if at_once:
            others.append(_answer_at_once(subject, said, out))
        return steps_of(out).repeat(len(others), 1, 1), torch.cat(others)

    return as_close_as_plain(subject, ways, config=subject.gaze, said=subject.said)


def beams(subject: Subject) -> Finding:
    """The likelihood of each row's best beam, against one pass over it."""
    why_not = _why_not_at_once(subject)
    if why_not is not None:
        raise CannotShow(why_not)

    def ways(said: Saliency | None) -> tuple[Tensor, Tensor]:
        out = subject.generate(said, num_beams=BEAMS, output_scores=True, length_penalty=0.0)
        chosen = out.sequences[:, -NEW_TOKENS:, None]
        likely = _answer_at_once(subject, said, out).float().log_softmax(-1).gather(-1, chosen)
        return out.sequences_scores, likely.sum((1, 2))

    return as_close_as_plain(subject, ways, config=subject.gaze, said=subject.said)


def _answer_at_once(subject: Subject, said: Saliency | None, out: Any) -> Tensor:
    """Logits of each new token, of one pass over prompt and answer."""
    whole = subject.logits(shifted(said, after=NEW_TOKENS), continued(subject, out.sequences))
    return whole[:, -NEW_TOKENS - 1 : -1]


def _why_not_at_once(subject: Subject) -> str | None:
    """Why one pass over prompt and answer would be steered otherwise than the passes of `generate`; None where it would not."""
    attention, said = subject.attention, subject.said
    if attention.phase_factors != (1.0, 1.0, 1.0) or attention.gate is not None:
        return "one pass over prompt and answer knows nothing of this gaze's scope, schedule or gate"
    if said is None and attention.saliency.reads_prompt:
        return "this gaze's saliency is read from the whole prompt, which the answer would be a part of"
    if said is not None and said.tokens is not None and attention.saliency.preserve_mass:
        return "mass is preserved over the prompt, which one pass cannot tell from the answer"
    return None


def threads(subject: Subject) -> Finding:
    """Several of them at once, each looking elsewhere, against the same in turn."""
    said = [subject.tokens_said(seed) for seed in range(1, THREADS + 1)]
    found: list[Any] = [None] * len(said)

    def work(index: int) -> None:
        try:
            found[index] = steps_of(subject.generate(said[index]))
        except Exception as error:  # of another thread, to be raised in this one
            found[index] = error

    with subject.patched(subject.gaze):
        in_turn = [steps_of(subject.generate(own)) for own in said]
        running = [threading.Thread(target=work, args=(index,)) for index in range(len(said))]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    for own in found:
        if isinstance(own, Exception):
            raise own
    if torch.equal(in_turn[0], in_turn[1]):
        return Finding(False, note="two different statements gave the same logits")
    return all_of(*(equal(together, alone) for together, alone in zip(found, in_turn, strict=True)))


def nothing_asked(subject: Subject) -> Finding:
    """Patched, and nobody says where to look."""
    with subject.patched(subject.silent):
        steps = steps_of(subject.generate())
        return all_of(equal(subject.logits(), subject.plain, "forward"), equal(steps, subject.plain_steps, "generate"))
