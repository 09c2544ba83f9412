"""What is promised of a steered `generate`."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from hf_steer.ground.arguments import named
from hf_steer.ground.decoders import reads_encoder
from hf_steer.saliency import Saliency
from hf_steer.testing.compared import as_close_as_plain
from hf_steer.testing.prompts import continued, shifted
from hf_steer.testing.report import CannotShow, Finding
from hf_steer.testing.subject import NEW_TOKENS, Subject, all_of, equal, steps_of

BEAMS = 3
THREADS = 3


def decoding(subject: Subject) -> Finding:
    """Prompt, then token by token on a cache, against one pass over prompt and answer where that can be, and against no cache."""
    at_once = why_not_at_once(subject) is None
    if subject.attention.gate is not None:
        raise CannotShow("a gate remembers on the cache what it measured, so without one nothing can be computed anew")

    def ways(said: Saliency | None) -> tuple[Tensor, Tensor]:
        out = subject.generate(said)
        pairs = [(steps_of(out), _answer_at_once(subject, said, out))] if at_once else []
        if subject.thorough or not at_once:
            pairs.append(while_alike(out, subject.generate(said, **named(keeps_cache=False))))
        found, expected = zip(*pairs, strict=True)
        return torch.cat([own.flatten(0, 1) for own in found]), torch.cat([own.flatten(0, 1) for own in expected])

    return as_close_as_plain(subject, ways, config=subject.gaze, said=subject.said)


def while_alike(out: Any, other: Any) -> tuple[Tensor, Tensor]:
    """Logits of all steps before which both have said the same: two near words may come out the other way round."""
    found, expected = steps_of(out), steps_of(other)
    words, others = out.sequences[:, -found.shape[1] :], other.sequences[:, -expected.shape[1] :]
    count = min(words.shape[1], others.shape[1])  # sounds that are heard in stretches may be written with another number of them
    alike = (words[:, :count] == others[:, :count]).int().cumprod(1).bool()
    same = torch.cat([torch.ones_like(alike[:, :1]), alike[:, :-1]], 1)[..., None]
    return torch.where(same, found[:, :count], 0), torch.where(same, expected[:, :count], 0)


def beams(subject: Subject) -> Finding:
    """The likelihood of each row's best beam, against the same words said without beams."""
    at_once = why_not_at_once(subject) is None

    def ways(said: Saliency | None) -> tuple[Tensor, Tensor]:
        out = subject.generate(said, num_beams=BEAMS, output_scores=True, length_penalty=0.0)
        again = _answer_at_once(subject, said, out) if at_once else _said_again(subject, said, out)
        likely = again.float().log_softmax(-1).gather(-1, out.sequences[:, -NEW_TOKENS:, None])
        return out.sequences_scores, likely.sum((1, 2))

    return as_close_as_plain(subject, ways, config=subject.gaze, said=subject.said)


def _said_again(subject: Subject, said: Saliency | None, out: Any) -> Tensor:
    """Logits of each new token of a `generate` that may say no other words than those."""

    def word(row: int, tokens: Tensor) -> list[int]:
        return [int(out.sequences[row, len(tokens)])]

    return steps_of(subject.generate(said, prefix_allowed_tokens_fn=word))


def _answer_at_once(subject: Subject, said: Saliency | None, out: Any) -> Tensor:
    """Logits of each new token, of one pass over prompt and answer."""
    whole = subject.logits(shifted(subject, said, after=NEW_TOKENS), continued(subject, out.sequences))
    return whole[:, -NEW_TOKENS - 1 : -1]


def why_not_at_once(subject: Subject) -> str | None:
    """Why one pass over prompt and answer would be steered otherwise than the passes of `generate`; None where it would not."""
    attention, said = subject.attention, subject.said
    if attention.phase_factors != (1.0, 1.0, 1.0) or attention.gate is not None:
        return "one pass over prompt and answer knows nothing of this gaze's scope, schedule or gate"
    if reads_encoder(subject.anatomy.root):
        return "the prompt is an encoder's"
    if said is None and attention.saliency.reads_prompt:
        return "this gaze's saliency is read from the whole prompt, which the answer would be a part of"
    scaled = attention.saliency.preserve_mass or attention.saliency.normalize != "none"
    if said is not None and said.tokens is not None and scaled:
        return "scores are scaled over the prompt, which one pass cannot tell from the answer"
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
