"""One steered pass and one step, tried on a small likeness of the decoder before anything is touched.

A decoder hands keyword arguments and its cache on to its attention in a way that each release may change. What that comes to is
seen by running it: a likeness of one layer on the meta device, without weights, stopped where its attention function is called.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from hf_steer.ground.arguments import Given, read_call, with_changes
from hf_steer.ground.attention_call import called_by_name
from hf_steer.ground.caches import keys_seen, past_of
from hf_steer.ground.implementations import implementation_of, register_function, with_implementation

NAME = "hf_steer_proof"
TOKENS = 2


class Arrived(Exception):
    """The attention function was called; the rest of the pass need not run."""

    def __init__(self, keys: int, signed: bool) -> None:
        super().__init__()
        self.keys, self.signed = keys, signed


def prove_keyword(decoder: nn.Module, attention: str, keyword: str) -> str | None:
    """What goes wrong in a prompt of two tokens and a step after it; None where both arrive with keyword and cache.

    Args:
        decoder: of the model; it is not run.
        attention: path of the attention module from the decoder, such as `"layers.0.self_attn"`.
        keyword: that has to reach the attention function.
    """
    try:
        return _prove(decoder, attention, keyword)
    except Exception as error:  # a changed forward may fail in any way, and that it fails is what is looked for
        return f"a likeness with one layer raises {type(error).__name__}: {error}"


def _prove(decoder: nn.Module, attention: str, keyword: str) -> str | None:
    register_function(NAME, called_by_name(_arrive))
    likeness = likeness_of(decoder)
    module: Any = likeness.get_submodule(attention)
    module.config = with_implementation(module.config, NAME)
    cache = DynamicCache(config=likeness.config)
    for tokens, before in ((TOKENS, 0), (1, TOKENS)):
        fault = _try(likeness, cache, tokens, before, keyword)
        if fault is not None:
            return fault
    return None


def likeness_of(decoder: Any) -> Any:
    """A decoder of the same class with one layer, on the meta device."""
    config = copy.deepcopy(decoder.config)
    config.num_hidden_layers = 1
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = kinds[:1]
    if implementation_of(config) not in ("eager", "sdpa"):  # their masks want a GPU; which function is called stays the same
        config = with_implementation(config, "eager")
    with torch.device("meta"):  # of this thread; no_init_weights would switch initialisation off for all threads
        return type(decoder)(config).eval()


@torch.no_grad()
def _try(likeness: nn.Module, cache: Any, tokens: int, before: int, keyword: str) -> str | None:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    named = with_changes(likeness, Given({}), ids=ids, cache=cache, keeps_cache=True)
    seen = read_call(likeness, (), named).cache
    (sizes,) = keys_seen(cache, tokens, (0,))
    try:
        likeness(**named, **{keyword: True})
    except Arrived as arrived:
        what = "prompt" if before == 0 else "step"
        if not arrived.signed:
            return f"in a {what} the keyword {keyword!r} does not reach the attention function"
        if seen is not cache or arrived.keys != before + tokens or sizes != (before + tokens, 0):
            return f"in a {what} on a cache of {before} keys the attention sees {arrived.keys}, and {sizes} were told"
        if past_of(cache) != before + tokens:
            return f"after a {what} the cache tells {past_of(cache)} keys, and holds {before + tokens}"
        return None
    return "the decoder runs without calling the attention function that its layers' configs name"


def _arrive(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    raise Arrived(key.shape[2], options.get("hf_steer") is True)


def takes_keywords(function: Callable[..., Any]) -> bool:
    """Whether a function takes keyword arguments that it does not name."""
    return any(own.kind is own.VAR_KEYWORD for own in inspect.signature(inspect.unwrap(function)).parameters.values())
