"""The model type `hf-steer` of lm-evaluation-harness: transformers' one, patched, its gaze set document by document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional

from hf_steer.errors import ConfigError
from hf_steer.ground.arguments import IGNORED_LABEL, named
from hf_steer.ground.outputs import logits_in
from hf_steer.harness.looks import look_of, runs_of
from hf_steer.io import from_pretrained
from hf_steer.patching import disable_steering, unpatch_model, use_saliency
from hf_steer.saliency import Saliency

_PADDING = 0
"""What the harness fills the ends of shorter rows with."""


@register_model("hf-steer")
class SteeredLM(HFLM):
    """A decoder with its steering. A document whose field `look` quotes its prompt is steered there, all others are plain.

    Args:
        pretrained: folder or Hub repository of the base model.
        steer_config: folder or Hub repository of a saved steering; what lies beside the model when None.
        gguf_file: of the model, in that folder.
        steers: False runs every document plain, through the same code: the figure to compare with.
        device: the CPU when None, or when there is no GPU.
        dtype: of the weights.
        batch_size: a number.
        tokenizer: of the model; its own when None.
        **kwargs: as of the harness's own model type `hf`, as far as they are not about loading.

    Raises:
        ConfigError: `batch_size="auto"`.
    """

    def __init__(
        self,
        pretrained: str,
        steer_config: Any = None,
        *,
        gguf_file: str | None = None,
        steers: bool = True,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        batch_size: int | str | None = 1,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        from transformers import AutoTokenizer

        if not str(batch_size or 1).isdigit():
            raise ConfigError(f"batch_size must be a number; got {batch_size!r}, whose trial passes belong to no document.")
        if not device or (str(device).startswith("cuda") and not torch.cuda.is_available()):
            device = "cpu"  # the harness says "cuda" by itself, and its own model type comes here, too
        model = from_pretrained(pretrained, steer_config, gguf_file=gguf_file, dtype=dtype).to(device).eval()
        if tokenizer is None:
            file = {} if gguf_file is None else {"gguf_file": gguf_file}
            tokenizer = AutoTokenizer.from_pretrained(pretrained, **file)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=int(batch_size or 1), backend="causal", **kwargs)
        self.steers = steers
        self.looks: Mapping[str, tuple[str, ...]] | None = None
        self.marks: dict[tuple[int, ...], tuple[list[float], int]] = {}  # row -> its scores, and where its answer begins
        self.texts: Sequence[str] = ()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._in_runs(super().loglikelihood, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._in_runs(super().generate_until, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Whole texts, which have no prompt to point at: plain."""
        with disable_steering(self.model):
            rolled: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return rolled

    def _in_runs(self, answer: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool) -> list[Any]:
        looks = [look_of(request.doc) if self.steers else () for request in requests]
        answers: dict[int, Any] = {}
        for run in runs_of([request.args[0] for request in requests], looks):
            with self._looking(run.looks):
                found = answer([requests[number] for number in run.numbers], disable_tqdm=disable_tqdm)
            answers |= dict(zip(run.numbers, found, strict=True))
        return [answers[number] for number in range(len(requests))]

    @contextmanager
    def _looking(self, looks: Mapping[str, tuple[str, ...]] | None) -> Iterator[None]:
        if looks is None:
            with disable_steering(self.model):
                yield
            return
        self.looks = looks
        try:
            yield
        finally:
            self.looks, self.marks, self.texts = None, {}, ()

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Theirs; what each row will read is known here, together with the context that it reads."""
        if self.looks is not None:
            scored: dict[str, list[float]] = {}
            for (context, _), ids, continuation in requests:
                if context not in scored:
                    said = Saliency.from_text([self.looks[context]], self.tokenizer, torch.tensor([ids]))
                    scored[context] = said.tokens[0].tolist()  # type: ignore[index]
                read = slice(-(self.max_length + 1), None)
                row, marks = (ids + continuation)[read], (scored[context] + [0.0] * len(continuation))[read][:-1]
                if not any(marks):
                    raise ConfigError(
                        f"what is pointed at lies before the last {len(row)} tokens, which are all that is read of a prompt that "
                        f"begins {context[:60]!r}. Give the model a larger max_length, or shorter prompts."
                    )
                known = marks, max(0, len(row) - len(continuation))
                if self.marks.setdefault(tuple(row[:-1]), known) != known:
                    raise ConfigError(f"two contexts read the same in tokens and point at different stretches: {context!r}.")
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return answers

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Theirs for plain documents; with the marks of each row for the others.

        Labels say which queries generate an answer, for steerings of those alone. The last token of an answer is not read, so a
        column that is masked stands for it.
        """
        if self.looks is None:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        ids = functional.pad(inps, (0, 1))
        scores, real, answers = torch.zeros(ids.shape), torch.zeros_like(ids), torch.full_like(ids, IGNORED_LABEL)
        for row, (own, start) in enumerate(map(self._known, inps.tolist())):
            scores[row, : len(own)], real[row, : len(own)], answers[row, start : len(own) + 1] = torch.tensor(own), 1, 0
        kind, mixed = self.device.type, self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(device_type=kind, dtype=mixed, enabled=mixed is not None):
            said = Saliency.from_tokens(scores)
            return logits_in(self.model(**named(ids=ids, mask=real, labels=answers), saliency=said))[:, :-1]

    def _known(self, row: list[int]) -> tuple[list[float], int]:
        end = len(row)
        while tuple(row[:end]) not in self.marks:
            if not end or row[end - 1] != _PADDING:
                raise ConfigError("the harness asked for a row of tokens that belongs to none of its requests.")
            end -= 1
        return self.marks[tuple(row[:end])]

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Theirs; the rows that are generated from next are these."""
        self.texts = strings
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        if self.looks is None:
            plain: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
            return plain
        said = Saliency.from_text([self.looks[text] for text in self.texts], self.tokenizer, context)
        with use_saliency(self.model, said):
            steered: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        return steered


def unpatched(lm: SteeredLM) -> HFLM:
    """The harness's own model type around the same weights, by a copy without steering."""
    import copy

    plain = unpatch_model(copy.deepcopy(lm.model))
    return HFLM(pretrained=plain, tokenizer=lm.tokenizer, batch_size=lm.batch_size, backend="causal")
