"""A dense oracle: the unpatched model in eager attention and float32, with `λ · s` added to its masks entry by entry.

It shares no code with what steers: no backend, no hook, no state on a cache, no keyword. What it needs of hf_steer is where the
attention modules are, and how a module is given another attention function. Not in float64: eager attention takes its softmax in
float32, where the least float64, which stands for what is masked, would be minus infinity.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.families import resolve
from hf_steer.ground.attention_call import layer_of
from hf_steer.ground.implementations import function_of, register_function, use_implementation
from hf_steer.ground.outputs import logits_in
from hf_steer.patching.edits import SetAttentionFunction
from hf_steer.testing.report import CannotShow
from hf_steer.testing.softened import SoftenedLayer

NAME = "hf_steer_dense_oracle"
_ADDED: ContextVar[tuple[Mapping[int, Tensor], Tensor] | None] = ContextVar("hf_steer_dense_oracle", default=None)
"""Layer -> λ per head, and the score of each token, for the call that this thread is in."""


class DenseOracle:
    """A copy of an unpatched model that steers as the formula is written.

    Args:
        model: not patched; it is copied.

    Raises:
        CannotShow: no copy in float32 can be made.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            self.model: Any = copy.deepcopy(model).float()
            use_implementation(self.model, "eager")
        except (RuntimeError, ValueError) as error:  # no memory, weights that are quantised
            raise CannotShow(f"no copy in float32 with eager attention can be made: {error}") from error
        register_function(NAME, _attend_densely)
        self.sites = resolve(self.model).layers

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any], strengths: Mapping[int, tuple[float, ...]], scores: Tensor) -> Tensor:
        """Steered.

        Args:
            inputs: of the model.
            strengths: layer -> λ per query head.
            scores: `(batch, tokens)`.
        """
        own = {name: _as_float(value) for name, value in inputs.items()}
        table = {layer: torch.tensor(values, device=scores.device) for layer, values in strengths.items()}
        with ExitStack() as edits:
            for site in self.sites:
                if site.takes is not None:
                    if site.index in table:
                        bias = table[site.index][None, :, None, None] * scores.float()[:, None, None, :]
                        edits.enter_context(SoftenedLayer(site.module, bias))
                    continue
                edits.enter_context(SetAttentionFunction(site.module, NAME, layer=site.index))
            token = _ADDED.set((table, scores.float()))
            try:
                return logits_in(self.model(**own))
            finally:
                _ADDED.reset(token)


def _as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _attend_densely(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    added = _ADDED.get()
    if added is None or mask is None:
        raise CannotShow("eager attention of this model gets no mask that a bias could be added to")
    table, scores = added
    strength = table.get(layer_of(module))
    if strength is not None:
        mask = mask + strength.to(mask.device)[None, :, None, None] * scores.to(mask)[:, None, None, :]
    return function_of("eager", type(module))(module, query, key, value, mask, **options)
