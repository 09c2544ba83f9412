"""A chat model that reads reports: its prompts, its answers under a gaze, and which of its heads look at what it repeats."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_steer.attention import AttentionCall, logits_in_chunks
from hf_steer.config import AttentionConfig, SaliencyConfig, SteerConfig
from hf_steer.config.checks import Heads
from hf_steer.errors import FileError
from hf_steer.evidence.reports import Report
from hf_steer.ground.arguments import Given
from hf_steer.io import from_pretrained
from hf_steer.patching import disable_steering, patch_model, probe_attention, unpatch_model, use_saliency
from hf_steer.saliency import Saliency

BATCH, NEW_TOKENS = 24, 12
CPU_WITH_BF16 = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Condition:
    """What is done to the model: where the saliency lies, in which heads, how strongly."""

    saliency: str
    named: str
    heads: Heads
    strength: float


def quick_dtype() -> torch.dtype:
    """bfloat16 on a CPU that multiplies it itself, which is more than twice as fast there; float32 on every other."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if any(known.get(name) for name in CPU_WITH_BF16) else torch.float32


def gaze(heads: Heads, strength: float) -> SteerConfig:
    """λ is what is added to the logits of the span, so that its odds in each head multiply by e^λ."""
    saliency = SaliencyConfig(source=None, normalize="none")
    return SteerConfig(attention=AttentionConfig(heads=heads, strength=strength, saliency=saliency))


def gguf_in(folder: str | os.PathLike[str]) -> str | None:
    """The GGUF file of a folder; None for a model in transformers' own files.

    Raises:
        FileError: several, and no other model.
    """
    if (Path(folder) / "config.json").is_file():
        return None
    names = sorted(path.name for path in Path(folder).glob("*.gguf"))
    if len(names) > 1:
        raise FileError(f"{os.fspath(folder)!r} holds the GGUF files {names}; name a folder with one of them.")
    return names[0] if names else None


class Answering:
    """A chat model, prompts for it, and its answers.

    Args:
        folder: of a text model with a chat template, in transformers' files or as one GGUF file.
        dtype: it runs in.
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer

        file = gguf_in(folder)
        named = {} if file is None else {"gguf_file": file}
        self.model = from_pretrained(folder, gaze("all", 1.0), dtype=dtype, **named).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **named)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def inputs(self, reports: Sequence[Report], *, begun: bool = False) -> dict[str, Tensor]:
        """A batch of prompts, as a chat; `begun`: with the answer by the pointed-at report, up to its word."""
        chats = [[{"role": "user", "content": report.text}] for report in reports]
        texts = [str(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)) for chat in chats]
        if begun:
            texts = [text + report.before_word for text, report in zip(texts, reports, strict=True)]
        return dict(self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False))

    def saliency(self, kind: str, reports: Sequence[Report], given: Given, seed: int) -> Saliency:
        """What is said about each prompt of a batch: one of the conditions of `run_real`."""
        shift = 1 if kind == "another report" else 0
        scores = self._scores([report.spans[(report.meant + shift) % len(report.spans)] for report in reports], given)
        real = given.mask.bool()
        if kind == "uniform":
            return Saliency.from_tokens(real.float())
        if kind == "shuffled":
            drawn = torch.Generator().manual_seed(seed)
            scores = scores.clone()
            for row, own in enumerate(real):
                places = own.nonzero().flatten()
                scores[row, places] = scores[row, places[torch.randperm(len(places), generator=drawn)]]
        return Saliency.from_tokens(scores)

    def _scores(self, spans: Sequence[str | Sequence[str]], given: Given) -> Tensor:
        scores = Saliency.from_text(spans, self.tokenizer, given.ids).tokens
        assert scores is not None
        return scores

    @contextmanager
    def steered(self, condition: Condition, reports: Sequence[Report], given: Given, seed: int) -> Iterator[None]:
        """The model under one condition."""
        if condition.saliency == "nothing":
            with disable_steering(self.model):
                yield
            return
        patch_model(unpatch_model(self.model), gaze(condition.heads, condition.strength))
        with use_saliency(self.model, self.saliency(condition.saliency, reports, given, seed)):
            yield

    @torch.no_grad()
    def answers(self, condition: Condition, reports: Sequence[Report], bar: tqdm[Any], seed: int = 0) -> tuple[list[str], Tensor]:
        """What the model says, greedily, and `(prompts, vocabulary)` log-probabilities of its first token."""
        said: list[str] = []
        first = []
        bar.set_description(f"{condition.saliency}, {condition.named}, λ = {condition.strength:g}"[:48].ljust(48))
        for start in range(0, len(reports), BATCH):
            part = reports[start : start + BATCH]
            inputs = self.inputs(part)
            given = Given(inputs)
            with self.steered(condition, part, given, seed + start):
                out = self.model.generate(
                    **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
                )
            said += self.tokenizer.batch_decode(out.sequences[:, given.ids.shape[1] :], skip_special_tokens=True)
            first.append(torch.log_softmax(out.logits[0].float(), -1))
            bar.update(len(part))
        return said, torch.cat(first)

    @torch.no_grad()
    def looks(self, reports: Sequence[Report], bar: tqdm[Any]) -> Tensor:
        """`(layers, heads)`: attention to the report that an answer is about to repeat, less that to the others, on average."""
        bar.set_description("which heads look at what is repeated".ljust(48))
        total: Tensor | None = None
        for start in range(0, len(reports), BATCH):
            part = reports[start : start + BATCH]
            inputs = self.inputs(part, begun=True)
            given = Given(inputs)
            seen: dict[int, Tensor] = {}
            every = self._scores([report.spans for report in part], given)
            meant = self._scores([report.spans[report.meant] for report in part], given)
            spans = meant - (every - meant) / 3
            last = given.ids.shape[1] - 1

            def read(call: AttentionCall, seen: dict[int, Tensor] = seen, spans: Tensor = spans, last: int = last) -> None:
                _, own, _ = next(logits_in_chunks(call, queries=slice(last, last + 1)))
                on_reports = (torch.softmax(own[:, :, 0].float(), -1) * spans[:, None].to(own.device)).sum(-1)
                seen[call.layer] = on_reports.sum(0).cpu()

            with disable_steering(self.model), probe_attention(self.model, read):
                self.model(**inputs)
            found = torch.stack([seen[layer] for layer in sorted(seen)])
            total = found if total is None else total + found
            bar.update(len(part))
        assert total is not None  # there are prompts
        return total / len(reports)
