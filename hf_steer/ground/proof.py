"""A prompt and a step after it, tried on a likeness of the decoder before anything is touched.

A decoder hands keyword arguments and its cache on to its attention in a way that each family has and each release may change.
What that comes to is seen by running it: a likeness of the decoder on the meta device, without weights, whose attention
functions only note what they are called with (`ground/likeness.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_steer.ground.arguments import spelling_in
from hf_steer.ground.attention_call import called_by_name
from hf_steer.ground.implementations import register_function, with_implementation
from hf_steer.ground.likeness import SOURCE, TOKENS, Guessing, likeness_of, prompt_and_step, said_of, shell_of, widths_of

NAME = "hf_steer_proof"
KEYWORD = "hf_steer"
_SEEN = "hf_steer_seen"


@dataclass(frozen=True)
class Seen:
    """What one attention module was called with.

    Attributes:
        heads: of its queries.
        key_value_heads: of its keys.
        prompt: keys in each of its calls in the prompt.
        step: the same in the step after it; empty where that was not tried.
        keyword: whether the keyword arrived in all of them.
    """

    heads: int
    key_value_heads: int
    prompt: tuple[int, ...]
    step: tuple[int, ...]
    keyword: bool

    @property
    def reads_prompt(self) -> bool:
        """Whether its keys are the prompt's."""
        return TOKENS in self.prompt

    @property
    def goes_on(self) -> bool:
        """Whether a step adds its own token's key to them, as far as that was tried."""
        return not self.step or TOKENS + 1 in self.step

    @property
    def reads_encoder(self) -> bool:
        """Whether its keys are an encoder's."""
        return SOURCE in self.prompt


@dataclass(frozen=True)
class Proof:
    """What was seen.

    Attributes:
        seen: module that was called, by its path from the decoder -> how.
        whole: whether both passes came to their end.
        fault: what went wrong; empty where nothing did.
    """

    seen: Mapping[str, Seen]
    whole: bool
    fault: str = ""


@dataclass
class _Call:
    heads: int
    key_value_heads: int
    keys: int
    keyword: bool


_PROVEN: dict[tuple[Any, ...], Proof] = {}


def prove(decoder: Any, modules: Sequence[str]) -> Proof:
    """Run a likeness of a decoder over a prompt and a step; once per class and configuration in a process.

    Args:
        decoder: of the model; it is not run.
        modules: paths, from the decoder, of the modules that look an attention function up.
    """
    key = type(decoder), tuple(modules), decoder.config.to_json_string(use_diff=False)
    proof = _PROVEN.get(key) or _prove(decoder, modules)
    if any(own.goes_on for own in proof.seen.values()) or not (proof.fault or proof.seen):  # a fault may be mended
        _PROVEN[key] = proof
    return proof


def _prove(decoder: Any, modules: Sequence[str]) -> Proof:
    register_function(NAME, called_by_name(_note))
    best = Proof({}, whole=False)
    for make in (likeness_of, shell_of):
        for how in ({"encoder": True, "keyword": True}, {"encoder": False, "keyword": True}, {"encoder": False, "keyword": False}):
            if how["encoder"] and spelling_in(decoder, "encoder_states") is None:
                continue
            try:
                likeness = _watched(make(decoder), modules)
            except Exception as error:  # any class of decoder may need what its configuration alone does not say
                best = _better(best, Proof({}, whole=False, fault=f"a likeness of it cannot be made ({said_of(error)})"))
                break
            best = _better(best, _run(likeness, modules, **how))
            if best.whole and any(own.goes_on for own in best.seen.values()):
                return best
    return best


def _better(one: Proof, other: Proof) -> Proof:
    def rank(proof: Proof) -> tuple[int, bool, int]:
        return sum(own.goes_on for own in proof.seen.values()), proof.whole, len(proof.seen)

    return other if rank(other) > rank(one) or not (one.seen or one.fault) else one


def _watched(likeness: Any, modules: Sequence[str]) -> Any:
    """Let its attention note what it gets, and let nothing else end the pass: experts cannot be dealt out without numbers."""
    around = {"", *(name.rsplit(".", depth)[0] for name in modules for depth in range(1, name.count(".") + 1))}
    for name in modules:
        module: Any = likeness.get_submodule(name)
        module.config = with_implementation(module.config, NAME)
    for name, module in list(likeness.named_modules()):
        parent = name.rpartition(".")[0]
        if name and parent in around and name not in around and name not in modules and any(True for _ in module.parameters()):
            module.forward = partial(_tolerant, module.forward)
    return likeness.to(torch.bfloat16)  # kernels for experts take no other


def _tolerant(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return forward(*args, **kwargs)
    except Exception:
        first = next((own for own in (*args, *kwargs.values()) if isinstance(own, Tensor) and own.is_floating_point()), None)
        if first is None:
            raise
        return first


@torch.no_grad()
def _run(likeness: Any, modules: Sequence[str], *, encoder: bool, keyword: bool) -> Proof:
    """One prompt and one step, with what an encoder hands on in the first width that fits."""
    best = Proof({}, whole=False)
    for width in widths_of(likeness, modules) if encoder else (None,):
        for makes_cache in (True, False):
            proof = _pass_over(likeness, modules, width, keyword=keyword, makes_cache=makes_cache)
            best = _better(best, proof)
            if proof.whole and all(own.goes_on for own in proof.seen.values()):
                return proof
    return best


def _pass_over(likeness: Any, modules: Sequence[str], width: int | None, *, keyword: bool, makes_cache: bool) -> Proof:
    calls: dict[str, list[list[_Call]]] = {name: [] for name in modules}

    def begin(tokens: int) -> None:
        for name in modules:
            own: list[_Call] = []
            setattr(likeness.get_submodule(name), _SEEN, own)
            calls[name].append(own)

    fault = prompt_and_step(
        likeness, begin, mode=Guessing(), width=width, makes_cache=makes_cache, **({KEYWORD: True} if keyword else {})
    )
    seen = {name: own for name, passes in calls.items() if (own := _seen(passes)) is not None}
    return Proof(seen, whole=not fault, fault=fault)


def _seen(passes: Sequence[Sequence[_Call]]) -> Seen | None:
    every = [call for own in passes for call in own]
    if not every:
        return None
    step = tuple(call.keys for call in passes[1]) if len(passes) > 1 else ()
    prompt = tuple(call.keys for call in passes[0])
    return Seen(every[0].heads, every[0].key_value_heads, prompt, step, all(call.keyword for call in every))


def _note(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    own = getattr(module, _SEEN, None)
    if own is not None:
        own.append(_Call(query.shape[1], key.shape[1], key.shape[2], options.get(KEYWORD) is True))
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
