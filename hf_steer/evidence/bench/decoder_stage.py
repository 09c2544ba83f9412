"""Levels "layer" and "model": a decoder layer, or all of a model, called as transformers' `generate` and a trainer call them.

Contenders run on twins: model objects of their own that share every weight with the plain model, which is never patched.
What is set up once per prompt, such as a mask or ours' bias, is inside the clock at level "model" and outside at "layer".
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from hf_steer.config import SteerConfig
from hf_steer.evidence.bench.cells import Cell
from hf_steer.evidence.bench.scores import image_scores
from hf_steer.evidence.bench.timing import Call
from hf_steer.ground.arguments import Given, with_changes
from hf_steer.ground.implementations import use_implementation
from hf_steer.patching import patch_model
from hf_steer.patching.gaze.memory import trust_rows

Contexts = Callable[[], Sequence[AbstractContextManager[Any]]]
Past = tuple[tuple[Tensor, Tensor], ...]


class DecoderStage:
    """Inputs of one cell, and the calls on them.

    Args:
        cell: what is timed or verified.
        model: plain, of the cell's shape, layers and type.
        every_logit: return the logits of the whole prompt, not of its last token as `generate` asks for.
        seed: of tokens, hidden states and cache.
    """

    def __init__(self, cell: Cell, model: Any, *, every_logit: bool = False, seed: int = 0) -> None:
        self.cell, self.every_logit, shape = cell, every_logit, cell.shape
        self.training = cell.phase == "training"
        model.train(self.training)
        model.get_input_embeddings().weight.requires_grad_(self.training)
        self.model = model
        self._twins: dict[tuple[str, SteerConfig | None], Any] = {}
        generator = torch.Generator(cell.device).manual_seed(seed)
        drawn: dict[str, Any] = {"generator": generator, "device": cell.device}
        self.ids = torch.randint(0, model.config.vocab_size, (cell.batch, cell.queries), **drawn)
        self.hidden = torch.randn(cell.batch, cell.queries, shape.hidden, dtype=cell.torch_dtype, **drawn)
        self.gradient = torch.randn(self.hidden.shape, dtype=cell.torch_dtype, **drawn) if self.training else None
        size = (cell.batch, shape.key_value_heads, cell.tokens, shape.head_dim)
        self.past: Past = tuple(
            (torch.randn(size, dtype=cell.torch_dtype, **drawn), torch.randn(size, dtype=cell.torch_dtype, **drawn))
            for _ in range(cell.layers if cell.phase == "decode" else 0)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.hidden.dtype

    def scores(self, *, flat: bool = False) -> Tensor:
        """`(batch, keys)`: the prompt's; a new token has none."""
        cell = self.cell
        prompt = image_scores(cell.batch, cell.tokens, device=cell.device, flat=flat)
        return F.pad(prompt, (0, cell.keys - cell.tokens))

    def twin(self, implementation: str = "sdpa", config: SteerConfig | None = None) -> Any:
        """A model of the same weights with this attention implementation, patched when a configuration comes."""
        place = (implementation, config)
        if place not in self._twins:
            shared = {id(weight): weight for weight in self.model.parameters()}
            model = copy.deepcopy(self.model, shared)
            if implementation != "sdpa":
                use_implementation(model, implementation)
            self._twins[place] = model if config is None else patch_model(model, config)
        return self._twins[place]

    def call(
        self,
        model: Any,
        options: Callable[[], Mapping[str, Any]] = dict,
        *,
        contexts: Contexts = tuple,
        prime: bool = False,
        forward: Callable[..., Any] | None = None,
    ) -> Call:
        """A call of a model or of its first layer.

        Args:
            model: the plain one or a twin.
            options: makes further arguments, per call at level "model" and once at level "layer".
            contexts: makes the contexts around a call, entered before the clock starts.
            prime: in decode, let the call before this one run on the cache, so that it carries what a prefill leaves there.
            forward: called instead of the model.
        """
        cache = self._cache(model) if self.past else None
        arguments = self._arguments(model, cache)
        if cache is not None and prime:
            self._fill(cache, self.cell.tokens - 1)
            with torch.no_grad(), _all(contexts()):
                model(**arguments)
            self._fill(cache, self.cell.tokens)
            trust_rows(cache)  # a primed cache gets the keys of the cell, not those of its prompt

        @contextlib.contextmanager
        def around() -> Iterator[None]:
            if cache is not None:
                self._fill(cache, self.cell.tokens)
            try:
                with torch.set_grad_enabled(self.training), _all(contexts()):
                    yield
            finally:
                if cache is not None:
                    self._fill(cache, self.cell.tokens)  # its longer copy is let go

        if self.cell.level == "model":
            return Call(lambda: self._run_model(forward or model, {**arguments, **options()}), around)
        ready = options()
        held = sum(value.nbytes for value in ready.values() if isinstance(value, Tensor))
        return Call(self._layer_run(model, cache, ready), around, held)

    def wide(self) -> DecoderStage:
        """The same in float64. transformers' norms and rotary angles stay in float32, whatever the weights are."""
        found = copy.copy(self)
        found.model = copy.deepcopy(self.model).double()
        found.hidden = self.hidden.double()
        found.gradient = None if self.gradient is None else self.gradient.double()
        found.past = tuple((keys.double(), values.double()) for keys, values in self.past)
        found._twins = {}
        return found

    def _arguments(self, model: Any, cache: Any) -> dict[str, Any]:
        """Of every call of a model, named as it names them."""
        if self.training:
            return with_changes(model, Given({}), ids=self.ids, labels=self.ids, keeps_cache=False)
        kept = {} if self.every_logit else {"logits_kept": 1}
        return with_changes(model, Given({}), ids=self.ids, cache=cache, keeps_cache=True, **kept)

    def _run_model(self, model: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        output = model(**arguments)
        if not self.training:
            return (output.logits,)
        weight = self.model.get_input_embeddings().weight
        return (output.loss, *torch.autograd.grad(output.loss, weight))

    def _layer_run(self, model: Any, cache: Any, options: Mapping[str, Any]) -> Callable[[], tuple[Tensor, ...]]:
        layer = model.get_decoder().layers[0]
        hidden = self.hidden.detach().requires_grad_(self.training)
        places = torch.arange(self.cell.keys - self.cell.queries, self.cell.keys, device=self.cell.device)[None]
        with torch.no_grad():
            angles = model.get_decoder().rotary_emb(hidden, places)
        given = Given({"position_ids": places, "position_embeddings": angles})
        named = {**with_changes(layer, given, mask=None, cache=cache, keeps_cache=cache is not None), **options}

        def run() -> tuple[Tensor, ...]:
            output = layer(hidden, **named)
            if self.gradient is None:
                return (output,)
            return (output, *torch.autograd.grad(output, hidden, self.gradient))

        return run

    def _cache(self, model: Any) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        for layer, (keys, values) in enumerate(self.past):
            cache.update(keys[:, :, :1], values[:, :, :1], layer)
        return cache

    def _fill(self, cache: DynamicCache, tokens: int) -> None:
        """As it was after `tokens` tokens; every cache holds the same tensors until its own call adds to them."""
        layers: Any = cache.layers
        for layer, (keys, values) in zip(layers, self.past, strict=True):
            layer.keys, layer.values = keys[:, :, :tokens], values[:, :, :tokens]


@contextlib.contextmanager
def _all(contexts: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
