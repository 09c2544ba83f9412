"""An oracle for any architecture: the unpatched model, with `λ · s` added to the masks of its own attention calls, in floats.

It knows nothing of where hf_steer finds attention: it wraps what transformers' look-up of attention functions gives to all modules,
and which of them read the prompt is seen in a pass (as many queries and keys as the prompt has tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface


@dataclass
class AttentionCalls:
    """A block in which every call of an attention function is written down, and some are biased.

    Attributes:
        modules: whose calls are biased.
        bias: `λ · s`, `(rows, prompt tokens)`; None to look on alone.
        seen: module, queries and keys of each call.
    """

    modules: Collection[Any] = ()
    bias: Tensor | None = None
    seen: list[tuple[Any, int, int]] = field(default_factory=list)

    def __enter__(self) -> AttentionCalls:
        original = AttentionInterface.get_interface

        def look_up(*args: Any, **kwargs: Any) -> Any:
            return partial(self._attend, original(*args, **kwargs))

        self._patch = mock.patch.object(AttentionInterface, "get_interface", look_up)
        self._patch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._patch.stop()

    def reading(self, tokens: int) -> list[Any]:
        """The modules of which a call had so many queries, and as many keys."""
        found = [module for module, queries, keys in self.seen if queries == keys == tokens]
        return list(dict.fromkeys(found))

    def _attend(
        self, function: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Tensor | None = None, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        self.seen.append((module, query.shape[2], key.shape[2]))
        if self.bias is not None and module in self.modules:
            attention_mask = _with_bias(attention_mask, self.bias, query, key.shape[2])
        return function(module, query, key, value, attention_mask, *args, **kwargs)


def _with_bias(mask: Tensor | None, bias: Tensor, query: Tensor, keys: int) -> Tensor:
    """The mask in floats, plus the bias on the prompt's keys, which come first; rows repeat for beams."""
    rows = bias.repeat_interleave(query.shape[0] // bias.shape[0], 0)
    added = query.new_zeros(query.shape[0], 1, query.shape[2], keys)
    added[..., : rows.shape[1]] += rows[:, None, None].to(query.dtype)
    if mask is None:
        return added
    if mask.dtype == torch.bool:
        return torch.where(mask[..., :keys], added, torch.finfo(query.dtype).min)
    return mask[..., :keys] + added
