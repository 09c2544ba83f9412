"""Attention whose code looks no attention function up, but adds its mask to its logits: found, and tried, on a likeness.

A module counts when it is the innermost to be called with a mask over the prompt's tokens, or with what an encoder hands on, and
when a mask per head, put in its mask's place, comes to an addition inside it, in a prompt and in a step after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.ground.additive import FORMS, OWN_FORMS, Additive, OneForAll, mask_of, parameters_of
from hf_steer.ground.arguments import spelling_in
from hf_steer.ground.implementations import looking_up
from hf_steer.ground.likeness import SOURCE, TOKENS, Guessing, likeness_of, prompt_and_step, said_of, shell_of, widths_of
from hf_steer.ground.proof import Seen

ROWS = 3
"""Of the prompt that is tried: told apart from one, and from its tokens."""
_SCALES = frozenset({"mul", "mul_", "div", "div_"})
_ADDS = frozenset({"add", "add_", "sub", "baddbmm", "_scaled_dot_product_attention_math"})
_KEEPS = frozenset(
    {"alias", "view", "_unsafe_view", "reshape", "slice", "select", "expand", "permute", "transpose", "unsqueeze", "_to_copy",
     "constant_pad_nd", "detach", "clone"}
)  # fmt: skip
"""After which a mask is still one."""


@dataclass(frozen=True)
class Masked:
    """Modules that a bias can be told by their mask.

    Attributes:
        seen: module, by its path from the decoder -> the keys that it was seen with.
        takes: the same module -> the argument that the bias is added to.
        left_out: modules that were called with a mask over the prompt, and why they cannot be steered.
    """

    seen: Mapping[str, Seen] = field(default_factory=dict)
    takes: Mapping[str, Additive] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


_PROVEN: dict[tuple[Any, ...], Masked] = {}


def find_masked(decoder: Any, inside: set[nn.Module], heads_of: Callable[[Any], int]) -> Masked:
    """The attention modules of a decoder that add their mask to their logits; tried once per class and configuration.

    Args:
        decoder: of the model; it is not run.
        inside: modules in it that read something other than its prompt.
        heads_of: query heads of a module.
    """
    heads = {name: heads_of(module) for name, module in decoder.named_modules() if module not in inside and _takes_mask(module)}
    key = type(decoder), tuple(heads.items()), decoder.config.to_json_string(use_diff=False)
    if heads and key not in _PROVEN:
        found = _prove(decoder, heads)
        if not found.takes:  # a fault may be mended
            return found
        _PROVEN[key] = found
    return _PROVEN[key] if heads else Masked()


def _takes_mask(module: Any) -> bool:
    kinds: list[Any] = [type(own) for own in module.modules()]
    return mask_of(type(module)) is not None and not any(looking_up(kind) for kind in kinds)


@torch.no_grad()
def _prove(decoder: Any, heads: Mapping[str, int]) -> Masked:
    fault = ""
    for make in (likeness_of, shell_of):
        try:
            likeness = make(decoder)
        except Exception as error:  # any class of decoder may need what its configuration alone does not say
            fault = f"a likeness of it cannot be made ({said_of(error)})"
            continue
        for how in _ways(likeness, tuple(heads)):
            noted, fault = _note(likeness, tuple(heads), how)
            own = {name: keys for name, keys in noted.items() if not _holds_another(name, noted)}
            if own and not fault:
                return _try(likeness, own, heads, how)
    return Masked(left_out={type(decoder).__name__: fault or "a pass calls no module with a mask over its tokens"})


def _ways(likeness: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """With what an encoder would hand on, where it takes that; with a cache of its own making, or one that it is given."""
    widths = list(widths_of(likeness, names)) if spelling_in(likeness, "encoder_states") is not None else []
    for width in (*widths, None):
        yield {"width": width, "makes_cache": True}
        yield {"width": width, "makes_cache": False}


def _holds_another(name: str, noted: Mapping[str, Any]) -> bool:
    return any(other.startswith(name + ".") if name else other for other in noted)


def _note(likeness: Any, names: Sequence[str], how: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], str]:
    """Keys that modules are called over, in the prompt and in the step; only those over the prompt's own, or an encoder's."""
    noted: dict[str, list[int]] = {name: [] for name in names}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kind = type(likeness.get_submodule(name))
        mask = {**dict(zip(parameters_of(kind), args, strict=False)), **kwargs}.get(str(mask_of(kind)))
        if isinstance(mask, Tensor) and mask.ndim == 4:
            noted[name].append(mask.shape[-1])
        elif any(isinstance(own, Tensor) and own.ndim == 3 and own.shape[1] == SOURCE for own in (*args, *kwargs.values())):
            noted[name].append(SOURCE)
        return args, kwargs

    with _Called(likeness, names, note):
        fault = prompt_and_step(likeness, lambda tokens: None, mode=Guessing(), rows=ROWS, **how)
    return {name: tuple(keys) for name, keys in noted.items() if keys and keys[0] in (TOKENS, SOURCE)}, fault


def _try(likeness: Any, noted: Mapping[str, tuple[int, ...]], heads: Mapping[str, int], how: Mapping[str, Any]) -> Masked:
    """Put a mask per head in the place of theirs: the first form that all of a class take."""
    kinds = {name: type(likeness.get_submodule(name)) for name in noted}
    takes: dict[str, Additive] = {}
    why: dict[str, str] = {}
    for kind, over in dict.fromkeys((kinds[name], noted[name][0]) for name in noted):
        names = [name for name in noted if (kinds[name], noted[name][0]) == (kind, over)]
        for form in (kind.__name__,) if kind.__name__ in OWN_FORMS else FORMS:
            additive = Additive(str(mask_of(kind)), form, parameters_of(kind))
            why = {**why, **dict.fromkeys(names, _try_form(likeness, names, additive, heads, over, how))}
            if not any(why[name] for name in names):
                takes |= dict.fromkeys(names, additive)
                break
    seen = {name: Seen(heads[name], heads[name], noted[name][:1], noted[name][1:2], keyword=False) for name in takes}
    return Masked(seen, takes, {name: why[name] for name in noted if name not in takes})


def _try_form(
    likeness: Any, names: Sequence[str], additive: Additive, heads: Mapping[str, int], over: int, how: Mapping[str, Any]
) -> str:
    """Why modules do not add masks per head, over so many keys in the prompt, in this form; empty where they do."""
    follows, tokens, calls, added = _Following(), [TOKENS, TOKENS], 0, 0

    def begin(count: int) -> None:
        tokens[:] = [count, over + (over == TOKENS and count != TOKENS)]

    def put(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal calls, added
        calls, added = calls + 1, added + follows.added
        follows.forget()

        def merge(mask: Tensor | None) -> Tensor:
            dtype = mask.dtype if mask is not None and mask.is_floating_point() else torch.float32
            return follows.follow(torch.empty(ROWS, heads[name], *tokens, dtype=dtype, device="meta"))

        args, kwargs = additive.added(args, kwargs, merge)
        for own in (*args, *kwargs.values()):
            if isinstance(own, OneForAll):  # made without being seen
                follows.follow(own)
        return args, kwargs

    with _Called(likeness, names, put):
        fault = prompt_and_step(likeness, begin, mode=follows, rows=ROWS, **how)
    if fault:
        return f"it takes no mask with a layer per head: {fault}"
    if follows.scaled:
        return "its code scales its logits once its mask is added, and a bias in it with them"
    return "" if calls == added + follows.added else "its code adds no mask to its logits"


class _Following(Guessing):
    """Sees whether a tensor, or what is cut out of it, is added to something."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.followed: dict[int, Tensor] = {}  # held, or another could take the number of one that is gone
        self.sums: dict[int, Tensor] = {}
        self.added = self.scaled = False

    def follow(self, tensor: Tensor) -> Tensor:
        """One more."""
        self.followed[id(tensor)] = tensor
        return tensor

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if args and id(args[0]) in self.sums:
            self.scaled = self.scaled or function.overloadpacket.__name__ in _SCALES
        if any(id(own) in self.followed for own in (*args, *(kwargs or {}).values())):
            name = function.overloadpacket.__name__
            if name in _ADDS:
                self.added, self.sums[id(result)] = True, result
            if name in _KEEPS:
                self.follow(result)
        return result


class _Called:
    """While it is open, the arguments of some modules' calls go through a function."""

    def __init__(self, likeness: Any, names: Sequence[str], change: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self.modules = {name: likeness.get_submodule(name) for name in names}
        self.change = change

    def __enter__(self) -> None:
        for name, module in self.modules.items():
            module.forward = partial(self._call, name, module.forward)

    def __exit__(self, *_: object) -> None:
        for module in self.modules.values():
            del module.forward

    def _call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.change(name, args, kwargs)
        return forward(*args, **kwargs)
