"""One call of an attention function of transformers, by our words: what comes in, and how to call what lies underneath."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor

from hf_steer.ground.implementations import is_their_own
from hf_steer.values import HeadBias

HARMLESS = frozenset({"kernel_options", "output_attentions", "position_ids", "use_cache", "cache_position", "head_dim", "training"})
"""Arguments that attention functions declare and that change no logit."""
UNDERSTOOD = frozenset(
    {"dropout", "scaling", "is_causal", "softcap", "s_aux", "position_bias", "sliding_window", "cache", *HARMLESS}
)
"""Arguments whose effect on the logits is known here; any other that a function declares is refused once it is used."""
SEGMENTS = "cu_seq_lens_q"
"""Where flash is told which pictures of a call lie in its one row."""
_TENSORS = 5
"""Every attention function takes module, query, key, value and mask first."""


@dataclass(frozen=True)
class AttentionCall:
    """What one decoder layer is about to attend with.

    Attributes:
        module: the attention module.
        inner: the attention function that it had.
        implementation: its name, such as `"sdpa"`.
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, key_value_heads, keys, head_dim)`.
        value: `(batch, key_value_heads, keys, value_dim)`.
        mask: as the implementation gets it: None; bool (True may attend) or float (added to the logits), `(batch or 1, heads or
            1, queries, keys)`; for flash `(batch, keys)`; for flex a BlockMask.
        bias: what the steering adds to the logits; None where the layer is not steered in this pass.
        options: the other arguments, by transformers' names.
    """

    module: Any
    inner: Callable[..., Any]
    implementation: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    bias: HeadBias | None
    options: Mapping[str, Any]

    @property
    def layer(self) -> int:
        """Its number."""
        return layer_of(self.module)

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        given = self.options.get("scaling")
        return self.query.shape[-1] ** -0.5 if given is None else given  # type: ignore[no-any-return]

    @property
    def causal(self) -> bool:
        """Whether no mask means causal: as the call says, or else the module."""
        given = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if given is None else given)

    @property
    def dropped(self) -> float:
        """Probability that a weight is dropped."""
        return self.options.get("dropout") or 0.0

    @property
    def cap(self) -> float | None:
        """The logits are bent by `cap · tanh(logits / cap)` before a mask is added; None where they are not."""
        return self.options.get("softcap")

    @property
    def sinks(self) -> bool:
        """Whether each head has a logit that goes to no key."""
        return self.options.get("s_aux") is not None

    @property
    def added(self) -> Tensor | None:
        """A bias that the model itself adds to the logits."""
        return self.options.get("position_bias")

    @property
    def paged(self) -> bool:
        """Whether the keys come from a paged cache, which the implementation reads itself."""
        return self.options.get("cache") is not None or self.implementation.startswith("paged")

    @property
    def plain(self) -> bool:
        """Whether the function underneath is transformers' own, so that another kernel may stand in for it."""
        return is_their_own(self.inner)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Arguments in use whose effect on the logits is not known."""
        return tuple(name for name in declared_unknown(self.inner) if self.options.get(name) is not None)

    @property
    def alters(self) -> tuple[Any, ...]:
        """What else changes its logits or weights, in so far as it decides how a bias can be carried."""
        return self.unknown, self.cap is None, self.sinks, self.added is None, self.dropped > 0

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scale: float | None = None, causal: bool | None = None
    ) -> tuple[Tensor, Any]:
        """The function underneath, with some of its arguments replaced: `(batch, queries, heads, value_dim)` and its weights."""
        changed = options_of(scale=scale, causal=causal)
        return self.inner(self.module, query, key, value, mask, **{**self.options, **changed})  # type: ignore[no-any-return]


def options_of(*, scale: float | None = None, causal: bool | None = None, added: Tensor | None = None) -> dict[str, Any]:
    """Options of an attention function by their names."""
    named = {"scaling": scale, "is_causal": causal, "position_bias": added}
    return {name: value for name, value in named.items() if value is not None}


def layer_of(module: Any) -> int:
    """The number of the decoder layer that an attention module belongs to."""
    return module.layer_idx  # type: ignore[no-any-return]


_DECLARED: dict[Callable[..., Any], tuple[str, ...]] = {}


def declared_unknown(function: Callable[..., Any]) -> tuple[str, ...]:
    """What an attention function declares, or reads out of further arguments, by a name that is not understood here.

    Looked up once, when the model is patched: a compiled graph could not.
    """
    if function not in _DECLARED:
        _DECLARED[function] = _look_up_declared(function)
    return _DECLARED[function]


def _look_up_declared(function: Callable[..., Any]) -> tuple[str, ...]:
    inner = function.keywords.get("flash", function) if isinstance(function, functools.partial) else function
    declared = list(inspect.signature(inspect.unwrap(inner)).parameters.values())[_TENSORS:]
    named = [own.name for own in declared if own.kind is not inspect.Parameter.VAR_KEYWORD]
    named += _strings_of(getattr(inspect.unwrap(inner), "__code__", None))
    return tuple(dict.fromkeys(name for name in named if name not in UNDERSTOOD))


def _strings_of(code: CodeType | None) -> Iterator[str]:
    """Words that a function's code mentions: whoever reads an argument out of `**kwargs` names it so."""
    for constant in () if code is None else code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
        elif isinstance(constant, CodeType):
            yield from _strings_of(constant)


def segments_of(options: Mapping[str, Any], tokens: int) -> list[int]:
    """Lengths of the pictures of a tower's call that come in one row, as flash gets them; one row alone otherwise."""
    starts = options.get(SEGMENTS)
    return [tokens] if starts is None else starts.diff().tolist()


def flex_attention(call: AttentionCall, mask: Any, added: Any) -> Tensor:
    """transformers' FlexAttention whatever lies underneath, with something that reads like a bias tensor.

    It is loaded when it is first asked for.
    """
    from transformers.integrations.flex_attention import flex_attention_forward

    options = {name: value for name, value in call.options.items() if name not in ("is_causal", "position_bias")}
    found: Any = flex_attention_forward(call.module, call.query, call.key, call.value, mask, position_bias=added, **options)
    return found[0]  # type: ignore[no-any-return]


def has_flex() -> bool:
    """Whether this torch has FlexAttention."""
    from transformers.utils.import_utils import is_torch_flex_attn_available

    return bool(is_torch_flex_attn_available())
