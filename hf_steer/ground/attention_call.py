"""One call of an attention function of transformers, by our words: what comes in, its bias, and how to call what is underneath."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_steer.ground.implementations import LAYER, is_their_own
from hf_steer.values import HeadBias

HARMLESS = frozenset({"kernel_options", "output_attentions", "position_ids", "use_cache", "cache_position", "head_dim", "training"})
"""Arguments that attention functions declare and that change no logit."""
UNDERSTOOD = frozenset(
    {"dropout", "scaling", "is_causal", "softcap", "s_aux", "sinks", "position_bias", "sliding_window", "cache", *HARMLESS}
)
"""Arguments whose effect on the logits is known here; any other that a function declares is refused once it is used."""
SEGMENTS = "cu_seq_lens_q"
"""Where flash is told which pictures of a call lie in its one row."""
_TENSORS = 5
"""Every attention function takes module, query, key, value and mask first."""


class Passing(Protocol):
    """What rides through a forward pass as the keyword `hf_steer`, as far as a call looks at it."""

    biases: Mapping[int, HeadBias]
    backend: str
    read: Callable[[Any], None] | None
    signed: set[int]
    chosen: dict[Any, Callable[..., Any]]


@dataclass(eq=False)
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
        queries: how many.
        scale: factor on the logits.
        causal: whether no mask means causal: as the call says, or else the module.
        dropped: probability that a weight is dropped.
        cap: the logits are bent by `cap · tanh(logits / cap)` before a mask is added; None where they are not.
        sinks: whether each head has a logit that goes to no key.
        added: a bias that the model itself adds to the logits.
        plain: whether the function underneath is transformers' own, so that another kernel may stand in for it.
        paged: whether the keys come from a paged cache, which the implementation reads itself.
        unknown: arguments in use whose effect on the logits is not known.
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
    queries: int = field(init=False)
    scale: float = field(init=False)
    causal: bool = field(init=False)
    dropped: float = field(init=False)
    cap: float | None = field(init=False)
    sinks: bool = field(init=False)
    added: Tensor | None = field(init=False)
    plain: bool = field(init=False)
    paged: bool = field(init=False)
    unknown: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Everything is read at once: backends look at it in every layer of every step."""
        option = self.options.get
        scale, causal = option("scaling"), option("is_causal")
        self.queries = self.query.shape[2]
        self.scale = self.query.shape[-1] ** -0.5 if scale is None else scale
        self.causal = bool(getattr(self.module, "is_causal", True) if causal is None else causal)
        self.dropped = option("dropout") or 0.0
        self.cap = option("softcap")
        self.sinks = option("s_aux") is not None or option("sinks") is not None
        self.added = option("position_bias")
        declared, self.plain = _facts(self.inner)
        self.unknown = tuple(name for name in declared if option(name) is not None)
        self.paged = option("cache") is not None or self.implementation.startswith("paged")

    @property
    def layer(self) -> int:
        """Its number."""
        return layer_of(self.module)

    @property
    def kind(self) -> tuple[Any, ...]:
        """In which the layers of one pass may differ; reentrant checkpointing runs them first without gradients, then with.

        Numbers among the options count unless they are 0, all others by being there.
        """
        options = self.options.items()
        used = tuple(name for name, value in options if value is not None and not (isinstance(value, (int, float)) and not value))
        learns = self.bias is not None and self.bias.query.requires_grad
        return self.mask is None, self.causal, self.key.device, torch.is_grad_enabled(), learns, used

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
    """The number of the decoder layer that an attention module belongs to: as its steering says, or else as it says itself."""
    number = getattr(getattr(module, "config", None), LAYER, None)
    return module.layer_idx if number is None else number  # type: ignore[no-any-return]


def steered_function(
    choose: Callable[[str, AttentionCall], Callable[..., Any]],
    fit: Callable[[AttentionCall, Any], HeadBias],
    unheard: Callable[[Any, Mapping[str, Any]], Passing | None],
    *,
    inner: Callable[..., Any],
    implementation: str,
) -> Callable[..., Any]:
    """What steered attention modules call in place of the function that they had.

    Args:
        choose: from the wanted backend's name and a call to what attends with its bias; holds for all calls of a pass that are
            alike.
        fit: the bias of a call whose keys or device are others than it was made for, or that depends on the call.
        unheard: judges a module that is called without the keyword, and its options; what rides through the pass all the same,
            or None.
        inner: the function that the modules had; calls of layers that are not steered reach it unchanged.
        implementation: its name.
    """
    return partial(_steer, choose=choose, fit=fit, unheard=unheard, inner=inner, implementation=implementation)


def _steer(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    choose: Callable[[str, AttentionCall], Callable[..., Any]],
    fit: Callable[[AttentionCall, Any], HeadBias],
    unheard: Callable[[Any, Mapping[str, Any]], Passing | None],
    inner: Callable[..., Any],
    implementation: str,
    hf_steer: Passing | None = None,
    **options: Any,
) -> Any:
    """Some families name the mask when they call, so our parameter has to be called as theirs is."""
    if hf_steer is None:
        hf_steer = unheard(module, options)
    if hf_steer is None:
        return inner(module, query, key, value, attention_mask, **options)
    layer = layer_of(module)
    bias = hf_steer.biases.get(layer)
    if bias is None and hf_steer.read is None:
        return inner(module, query, key, value, attention_mask, **options)
    call = AttentionCall(module, inner, implementation, query, key, value, attention_mask, bias, options)
    if hf_steer.read is not None:
        hf_steer.read(call)
    if bias is None:
        return inner(module, query, key, value, attention_mask, **options)
    if bias.key.shape[1] != key.shape[2] or bias.key.device != key.device or bias.share is not None:
        call.bias = bias = fit(call, hf_steer)
    attend = hf_steer.chosen.get(alike := call.kind)
    if attend is None:
        attend = hf_steer.chosen[alike] = choose(hf_steer.backend, call)
    hf_steer.signed.add(layer)
    output, weights = attend(call, bias)
    return (output if output.is_contiguous() else output.contiguous()), weights  # some modules look at it through .view()


def called_by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function of ours, as modules call it: some name the mask."""
    return partial(_call_by_name, function=function)


def _call_by_name(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *, function: Callable[..., Any], **options: Any
) -> Any:
    return function(module, query, key, value, attention_mask, **options)


_FACTS: dict[Callable[..., Any], tuple[tuple[str, ...], bool]] = {}
"""Of an attention function: what it declares that is not understood here, and whether it is transformers' own."""


def declared_unknown(function: Callable[..., Any]) -> tuple[str, ...]:
    """What an attention function declares, or reads out of further arguments, by a name that is not understood here."""
    return _facts(function)[0]


def _facts(function: Callable[..., Any]) -> tuple[tuple[str, ...], bool]:
    """Looked up once, when the model is patched: a compiled graph could not."""
    if function not in _FACTS:
        _FACTS[function] = _look_up_declared(function), is_their_own(function)
    return _FACTS[function]


def _look_up_declared(function: Callable[..., Any]) -> tuple[str, ...]:
    inner = function.keywords.get("flash", function) if isinstance(function, partial) else function
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
