"""Answers of one model to the cases under each condition, and the table that comes of them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_steer.evidence.pointing import wilson_interval
from hf_steer.evidence.text.cases import Case
from hf_steer.evidence.text.conditions import Condition
from hf_steer.ground.arguments import Given, named
from hf_steer.ground.outputs import logits_in
from hf_steer.patching import disable_steering, get_steer_status, patch_model, unpatch_model, use_saliency
from hf_steer.saliency import Saliency

READABLE_NATS = 3.0
"""Largest mean surprise per token, to the unsteered model that reads the prompt, of an answer that counts as readable."""
READABLE_DISTINCT = 0.5
"""Smallest share of different words in one."""


@dataclass(frozen=True)
class Answer:
    """What was said in one case.

    Attributes:
        text: without special tokens.
        nats: mean surprise per token to the unsteered model, given the same prompt.
        kl_nats: KL(unsteered ‖ this) of the first token's distribution; NaN where the prompt is another.
    """

    text: str
    nats: float
    kl_nats: float

    @property
    def is_readable(self) -> bool:
        """Whether it is text: neither one word over and over nor what no model would say."""
        words = re.findall(r"\w+", self.text.lower())
        return bool(words) and len(set(words)) >= READABLE_DISTINCT * len(words) and self.nats <= READABLE_NATS


@dataclass(frozen=True)
class TextRow:
    """One condition over all cases of one task.

    Attributes:
        task: a key of `TASKS`, with its length where it has several.
        condition: its name.
        right: share of answers that follow the span that is meant; `low` to `high` is its 95 % Wilson interval.
        wrong: share that follow another one.
        neither: share that follow none.
        readable: share that can be read; see `Answer.is_readable`.
        nats: mean surprise per token.
        kl_nats: mean KL of the first token's distribution against the unsteered one.
        cases: how many.
    """

    task: str
    condition: str
    right: float
    low: float
    high: float
    wrong: float
    neither: float
    readable: float
    nats: float
    kl_nats: float
    cases: int


class TextPointing:
    """One model that answers cases.

    Args:
        model: a causal language model, not patched, in evaluation mode.
        tokenizer: its own, with a chat template.
        batch_tokens: prompt tokens that go through the model together.
        new_tokens: longest answer.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_tokens: int = 6000, new_tokens: int = 24) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.new_tokens = batch_tokens, new_tokens
        self.first: dict[str, Tensor] = {}

    def answers(self, cases: Sequence[Case], condition: Condition) -> list[Answer]:
        """What the model says in each case, greedily."""
        if not condition.sets:
            return self._by_gaze(cases, condition, condition.gaze, condition.name)
        found: list[Answer] = []
        for number, gaze in enumerate(condition.sets):
            own = cases[number :: len(condition.sets)]
            found += self._by_gaze(own, condition, gaze, f"{condition.name}, set {number + 1}")
        order = [place for number in range(len(condition.sets)) for place in range(number, len(cases), len(condition.sets))]
        return [found[order.index(place)] for place in range(len(cases))]

    def row(self, task: str, cases: Sequence[Case], condition: Condition) -> TextRow:
        """One line of the table."""
        answers = self.answers(cases, condition)
        named_spans = [case.names(answer.text) for case, answer in zip(cases, answers, strict=True)]
        right = sum(case.meant == span for case, span in zip(cases, named_spans, strict=True))
        neither, count = named_spans.count(None), len(cases)
        low, high = wilson_interval(right, count)
        nats = sum(answer.nats for answer in answers) / count
        kl = sum(answer.kl_nats for answer in answers) / count
        readable = sum(answer.is_readable for answer in answers) / count
        wrong = count - right - neither
        return TextRow(
            task, condition.name, right / count, low, high, wrong / count, neither / count, readable, nats, kl, count
        )

    def _by_gaze(self, cases: Sequence[Case], condition: Condition, gaze: Any, title: str) -> list[Answer]:
        texts = [self._prompt(condition.ask(case)) for case in cases]
        if gaze is not None:
            patch_model(self.model, gaze)
        try:
            found: dict[int, Answer] = {}
            for batch in self._batches(texts, title):
                own = [cases[number] for number in batch]
                answers = self._answer([texts[number] for number in batch], own, condition, steered=gaze is not None)
                found |= dict(zip(batch, answers, strict=True))
        finally:
            if gaze is not None:
                unpatch_model(self.model)
        return [found[number] for number in range(len(cases))]

    def _batches(self, texts: Sequence[str], title: str) -> Iterator[list[int]]:
        """Numbers of the cases, the long ones together, under a progress bar."""
        lengths = [len(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        batches: list[list[int]] = [[]]
        for number in order:
            if batches[-1] and lengths[number] * (len(batches[-1]) + 1) > self.batch_tokens:
                batches.append([])
            batches[-1].append(number)
        yield from tqdm(batches, desc=f"{title:<32}", unit="batch", leave=False)

    @torch.no_grad()
    def _answer(self, texts: list[str], cases: list[Case], condition: Condition, *, steered: bool) -> list[Answer]:
        inputs = dict(self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False))
        given = Given(inputs)
        prompt = given.ids.shape[1]
        looking = use_saliency(self.model, self._saliency(cases, given, condition)) if steered else nullcontext()
        with looking:
            out = self.model.generate(
                **inputs, max_new_tokens=self.new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        said = out.sequences[:, prompt:]
        first = torch.log_softmax(out.logits[0].float(), -1)
        surprise = self._surprise(given, said)
        texts_said = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        answers = []
        for row, (case, text) in enumerate(zip(cases, texts_said, strict=True)):
            if not steered and condition.name == "unsteered":
                self.first[case.text] = first[row]
            before = self.first.get(case.text) if condition.ask(case) == case.text else None
            kl = float("nan") if before is None else float((before.exp() * (before - first[row])).sum().clamp(min=0))
            answers.append(Answer(text, float(surprise[row]), kl))
        return answers

    def _surprise(self, given: Given, said: Tensor) -> Tensor:
        """`(rows,)` mean nats per token of what was said, to the same model unsteered; the end is a token, what follows is not."""
        ids = torch.cat([given.ids, said], 1)
        last = said == self.tokenizer.convert_tokens_to_ids(self.tokenizer.eos_token)
        counted = (last.cumsum(1) - last.long()) == 0
        mask = torch.cat([given.mask, counted.to(given.mask.dtype)], 1)
        with disable_steering(self.model) if get_steer_status(self.model).patched else nullcontext():
            logits = logits_in(self.model(**named(ids=ids, mask=mask, logits_kept=said.shape[1] + 1)))
        taken = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, said[..., None])[..., 0]
        mean: Tensor = -(taken * counted).sum(1) / counted.sum(1)
        return mean

    def _saliency(self, cases: Sequence[Case], given: Given, condition: Condition) -> Saliency:
        if condition.look == "all":
            return Saliency.from_text([case.text for case in cases], self.tokenizer, given.ids)
        number = condition.look if callable(condition.look) else (lambda case: case.meant)
        spans = [case.spans[number(case)] for case in cases]
        told = Saliency.from_text([[span] for span in spans], self.tokenizer, given.ids)
        if condition.look != "shuffled":
            return told
        scores = told.tokens
        assert scores is not None
        for row, case in enumerate(cases):
            rng = random.Random(case.text)
            places = given.mask[row].nonzero()[:, 0].tolist()
            values = scores[row, places]
            scores[row, rng.sample(places, len(places))] = values
        return Saliency.from_tokens(scores)

    def _prompt(self, text: str) -> str:
        message = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
