"""Where a decoder's attention is, by structure: modules whose own code looks an attention function up, and which a dry pass calls.

No table is asked. What a module's class does tells which may be steered; which of them read the prompt itself, which an encoder,
and how many heads each has, is seen by running a likeness of the decoder without weights (`ground/proof.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from hf_steer.ground.arguments import spelling_in
from hf_steer.ground.decoders import decoder_of, encoders_inside
from hf_steer.ground.implementations import looking_up
from hf_steer.ground.likeness import TOKENS
from hf_steer.ground.masked_sites import Masked, find_masked
from hf_steer.ground.odd import why_odd
from hf_steer.ground.parts import Site
from hf_steer.ground.proof import Proof, Seen, prove
from hf_steer.ground.settings import has_setting, setting

Names = Mapping[nn.Module, str]
Carried = Literal["keyword", "pass", "mask"]


@dataclass(frozen=True)
class Attention:
    """The attention of one decoder that can be steered, or why there is none.

    Attributes:
        decoder: the module whose call is one pass; None where no language model reads a prompt.
        layers: attention to the prompt itself, by number.
        crosses: attention to what an encoder hands on, by number.
        carried: how the bias reaches them: `"keyword"`, as an argument that the decoder hands on; `"pass"`, out of the pass that
            this thread is in, where a decoder drops such arguments; `"mask"`, likewise, and added to the mask of modules that look
            no attention function up.
        carried_across: the same for attention to an encoder.
        left_out: modules that cannot be steered, and why.
        reason: why there is no decoder; empty where there is one.
    """

    decoder: Any
    layers: tuple[Site, ...] = ()
    crosses: tuple[Site, ...] = ()
    carried: Carried = "keyword"
    carried_across: Carried = "keyword"
    left_out: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


def find_attention(model: Any, names: Names, decoder: Any = None) -> Attention:
    """The decoder of a model and its attention modules.

    Args:
        model: a transformers model, on any device (meta included); nothing of it is changed or run.
        names: of its modules.
        decoder: where it is known; None to find it.
    """
    decoder = decoder_of(model) if decoder is None else decoder
    kind = type(decoder).__name__
    speaker = _speaking_part(model)
    if speaker is not None:
        return Attention(None, reason=f"{kind} has no forward pass of its own; patch the part of it that speaks, model.{speaker}")
    if odd := why_odd(model, decoder):
        return Attention(None, reason=odd)
    if spelling_in(decoder, "ids") is None:
        return Attention(None, reason=f"{kind}.forward takes no token numbers, so no language model reads a prompt here")
    inside = {module for tower in encoders_inside(model, decoder) for module in tower.modules()}
    found = {
        names[module]: module
        for module in decoder.modules()
        if module in names and module not in inside and _looks_up(module) and hasattr(module, "config")
    }
    by_function = _by_function(decoder, names, found) if found else Attention(None)
    if by_function.layers or by_function.crosses:
        return by_function
    by_mask = _by_mask(decoder, names, inside)
    return by_mask if by_mask.layers or not found else by_function


def _looks_up(module: Any) -> bool:
    kind: Any = type(module)
    return bool(looking_up(kind))


def _by_mask(decoder: Any, names: Names, inside: set[nn.Module]) -> Attention:
    """Attention that adds its mask to its logits, or why there is none of either kind."""
    kind, attending = type(decoder).__name__, _attention_in(decoder)
    if not attending:
        return Attention(
            None, reason=f"{kind} has no attention to steer: its layers carry what came before in a state of another kind"
        )
    if spelling_in(decoder, "cache") is None:
        return Attention(None, reason=f"{kind}.forward takes no cache of keys, on which what is said of a prompt could ride on")
    masked = find_masked(decoder, inside, lambda module: _configured(module, decoder, "heads"))
    if not masked.takes:
        return Attention(None, reason=_why_none(decoder, attending, masked))
    base = names[decoder] + "." if names[decoder] else ""
    found = {base + name: decoder.get_submodule(name) for name in masked.takes}
    seen = {base + name: own for name, own in masked.seen.items()}
    layers, crosses = (
        tuple(
            dataclasses.replace(site, takes=masked.takes[site.name.removeprefix(base)])
            for site in _sites({name: found[name] for name in found if seen[name].reads_encoder is across}, seen, decoder)
        )
        for across in (False, True)
    )
    left_out = {base + name: why for name, why in masked.left_out.items()}
    return Attention(decoder, layers, crosses, "mask", "mask", left_out)


def _by_function(decoder: Any, names: Names, found: Mapping[str, Any]) -> Attention:
    """Attention that looks its function up, as a likeness has shown it."""
    if spelling_in(decoder, "cache") is None:
        return Attention(decoder, left_out={type(decoder).__name__: "its forward takes no cache of keys"})
    base = names[decoder] + "." if names[decoder] else ""
    proof = prove(decoder, tuple(name.removeprefix(base) for name in found))
    seen = {base + name: own for name, own in proof.seen.items()}
    return _attention(decoder, found, seen, proof)


def _attention(decoder: Any, found: Mapping[str, Any], seen: Mapping[str, Seen], proof: Proof) -> Attention:
    own = [name for name in found if name in seen and seen[name].reads_prompt and seen[name].goes_on]
    others = [name for name in found if name in seen and seen[name].reads_encoder]
    if not proof.whole:  # it ended early: what it did not come to is told by its place among what it saw
        stacks = {stack_of(name) for name in own}
        own = [name for name in found if name in own or (name not in seen and stack_of(name) in stacks)]
    left_out = {name: _why_odd(seen[name]) for name in found if name in seen and name not in (*own, *others)}
    if not own and not others:
        left_out[type(decoder).__name__] = proof.fault or "a pass calls none of the modules that look an attention function up"
    return Attention(
        decoder,
        _sites({name: found[name] for name in own}, seen, decoder),
        _sites({name: found[name] for name in others}, seen, decoder),
        _how_carried(own, seen),
        _how_carried(others, seen),
        left_out,
    )


def _how_carried(names: Sequence[str], seen: Mapping[str, Seen]) -> Carried:
    return "keyword" if all(seen[name].keyword for name in names if name in seen) else "pass"


def _why_odd(seen: Seen) -> str:
    """In words, for a module whose keys are not those of the tokens."""
    if not seen.reads_prompt:
        return f"a prompt of {TOKENS} tokens gives it {seen.prompt[0]} keys, and which stands for which token is not known"
    return f"a step after {TOKENS} tokens gives it {seen.step[0]} keys, and which stands for which token is not known"


def _sites(found: Mapping[str, Any], seen: Mapping[str, Seen], decoder: Any) -> tuple[Site, ...]:
    sites = []
    for number, (name, module) in zip(numbers_of(found), found.items(), strict=True):
        heads = seen[name].heads if name in seen else _configured(module, decoder, "heads")
        shared = seen[name].key_value_heads if name in seen else _configured(module, decoder, "key_value_heads") or heads
        sites.append(Site(name, module, number, heads, shared, _slot_of(module)))
    return tuple(sorted(sites, key=lambda site: site.index))


def _slot_of(module: Any) -> int | None:
    """Which layer of a cache a module, or what it calls, says that it fills."""
    said = (getattr(own, name, None) for own in module.modules() for name in ("layer_idx", "layer_id"))
    slot = next((own for own in said if type(own) is int), -1)
    return slot if slot >= 0 else None


def _configured(module: Any, decoder: Any, word: str) -> int:
    settings = next((own for own in (module, getattr(module, "config", None), decoder.config) if has_setting(own, word)), None)
    return 0 if settings is None else int(setting(settings, word))


def numbers_of(found: Mapping[str, Any]) -> Sequence[int]:
    """The numbers of layers: as their modules say, as their names say, or as they come; the first that tells them apart."""
    ways: tuple[Callable[[], list[Any]], ...] = (
        lambda: [getattr(module, "layer_idx", None) for module in found.values()],
        lambda: [_number_in(name) for name in found],
    )
    for way in ways:
        numbers = way()
        if all(type(own) is int and own >= 0 for own in numbers) and len(set(numbers)) == len(numbers):
            return numbers
    return list(range(len(found)))


def _number_in(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def stack_of(name: str) -> str:
    """The list of layers that a module lies in: its name up to the first number, and what comes after it."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join([*parts[:first], "*", *parts[first + 1 :]])


def _speaking_part(model: Any) -> str | None:
    """Of a model that only holds others (Qwen-Omni), the one whose `generate` reads the prompt; None for any other model."""
    if "forward" in {name for own in type(model).__mro__ if issubclass(own, PreTrainedModel) for name in vars(own)}:
        return None
    parts = ((name, part) for name, part in model.named_children() if isinstance(part, PreTrainedModel) and part.can_generate())
    return next((name for name, part in parts if spelling_in(part, "ids") is not None), None)


def _attention_in(decoder: Any) -> list[str]:
    """Classes of its modules that attend, by their names."""
    return sorted({type(module).__name__ for module in decoder.modules() if "Attention" in type(module).__name__})


def _why_none(decoder: Any, attending: Sequence[str], masked: Masked) -> str:
    """In words, for a decoder whose attention neither looks a function up nor adds a mask that is told of the tokens."""
    faults = "; ".join(dict.fromkeys(masked.left_out.values()))
    return (
        f"the attention of {type(decoder).__name__} ({', '.join(attending[:3])}) calls no attention function that can be "
        f"exchanged, and adds no mask that a bias could be put into ({faults})"
    )
