"""A decoder's likeness on the meta device, without weights, and a prompt and a step to run it over.

What it gives are shapes alone: what comes to which module, and how much of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, EncoderDecoderCache

from hf_steer.ground.arguments import Given, with_changes
from hf_steer.ground.caches import made_caches
from hf_steer.ground.implementations import implementation_of, with_implementation

TOKENS, SOURCE = 2, 5
"""Of the prompt that is tried, and of what an encoder would hand on: told apart by their number."""
_FEW = 1_000_000
"""Numbers that a likeness may make for real."""


def likeness_of(decoder: Any) -> Any:
    """A decoder of the same class and configuration on the meta device."""
    config = copy.deepcopy(decoder.config)
    if implementation_of(config) not in ("eager", "sdpa"):  # their masks want a GPU; which function is called stays the same
        config = with_implementation(config, "eager")
    with torch.device("meta"):  # of this thread; no_init_weights would switch initialisation off for all threads
        return type(decoder)(config).eval()


def shell_of(decoder: nn.Module) -> nn.Module:
    """A copy of a decoder on the meta device, for classes that are not made from a configuration alone."""
    memo: dict[int, Any] = {}
    for owner in decoder.modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for buffer in owner._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    copied = copy.deepcopy(decoder, memo)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied.eval()


class Guessing(TorchDispatchMode):
    """Tensors without numbers, asked for one all the same: any will do, since what is noted are shapes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        first = args[0] if args else None
        if not isinstance(first, Tensor) or not first.is_meta:
            return function(*args, **kwargs)
        if name == "_local_scalar_dense":
            return True if first.dtype == torch.bool else 1
        if name == "nonzero":
            return first.new_zeros(1, first.ndim, dtype=torch.long)
        if name == "equal":
            return True
        if name == "split_with_sizes" and sum(args[1]) != first.shape[(dim := args[2] if len(args) > 2 else 0)]:
            return function(first, [first.shape[dim], *[0] * (len(args[1]) - 1)], *args[2:], **kwargs)
        if name == "index":  # with masks: as if each let one place through
            places = [_one_of(own) for own in args[1]]
            return function(first, [own for some in places for own in some], *args[2:], **kwargs)
        if name == "_to_copy" and kwargs.get("device") is not None and kwargs["device"].type != "meta" and first.numel() < _FEW:
            return torch.zeros(first.shape, **{**kwargs, "dtype": kwargs.get("dtype") or first.dtype})
        return function(*args, **kwargs)


def _one_of(index: Any) -> list[Any]:
    """An index, or for a mask the places of one entry."""
    if not isinstance(index, Tensor) or index.dtype != torch.bool:
        return [index]
    return [index.new_zeros(1, dtype=torch.long) for _ in range(index.ndim)]


def prompt_and_step(
    likeness: Any,
    begin: Callable[[int], None],
    *,
    mode: Guessing,
    width: int | None = None,
    makes_cache: bool = True,
    rows: int = 1,
    **more: Any,
) -> str:
    """Run a likeness over a prompt, and over a step on the cache that it gave.

    Args:
        likeness: of a decoder.
        begin: is told before each of the two how many tokens are new.
        mode: answers what tensors without numbers are asked.
        width: features of what an encoder hands on; None without one.
        makes_cache: whether the decoder makes its cache, which else is given to it.
        rows: of the prompt.
        more: handed to the likeness as it is.

    Returns:
        What went wrong; empty where nothing did.
    """
    cache, dtype = None, next((own.dtype for own in likeness.parameters()), torch.float32)
    for tokens in (TOKENS, 1):
        begin(tokens)
        ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
        changes: dict[str, Any] = {"ids": ids, "keeps_cache": True}
        if width is not None:
            changes["encoder_states"] = torch.zeros(rows, SOURCE, width, device="meta", dtype=dtype)
        try:
            if cache is None and not makes_cache:
                cache = _cache_for(likeness, width is not None)
            if cache is not None:
                changes["cache"] = cache
            named = with_changes(likeness, Given({}), **changes)
            with mode:
                output = likeness(**named, **more)
        except Exception as error:  # a changed forward may fail in any way, and that it fails is what is looked for
            return f"a {'prompt' if tokens == TOKENS else 'step'} of a likeness raises {said_of(error)}"
        cache = cache or next(iter(made_caches(output)), None)
    return ""


def _cache_for(likeness: Any, encoder: bool) -> Any:
    """For decoders that leave it to the model around them."""
    own = [DynamicCache(config=likeness.config) for _ in range(2)]
    return EncoderDecoderCache(*own) if encoder else own[0]


def widths_of(likeness: Any, modules: Sequence[str]) -> Iterator[int]:
    """Features of what an encoder would hand on, the likeliest first: the inputs of what makes keys."""
    linear = (child for name in modules for child in likeness.get_submodule(name).modules() if isinstance(child, nn.Linear))
    widths = dict.fromkeys(own.in_features for own in linear)
    yield from sorted(widths, key=list(widths).count, reverse=True)[:3]


def said_of(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
