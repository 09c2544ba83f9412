"""From a picture or a sound to the language model: which part of a model encodes it, and which then read what that gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from hf_steer.ground.arguments import ARGUMENTS
from hf_steer.ground.decoders import reads_encoder
from hf_steer.ground.flow import Call, Came, follow, method_of
from hf_steer.ground.stacks import stack_in
from hf_steer.ground.widths import is_norm

FEATURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"image": ("get_image_features", "get_video_features"), "audio": ("get_audio_features",)}
)
"""The methods of a model that encode a modality, the first that it has."""
PERCEIVED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"image": ("image_pixels", "video_pixels"), "audio": ("mels", "samples")}
)
"""Our words for the arguments that a modality comes in."""
HEARD: Mapping[str, str] = MappingProxyType({"image": "pictures", "audio": "sounds"})


@dataclass(frozen=True)
class Reader:
    """A part that reads what the tower gives: its path, in which argument, which fields, and whether they were regrouped."""

    part: str
    argument: int | str
    fields: frozenset[str]
    reshaped: bool


@dataclass(frozen=True)
class Way:
    """From a tower to the language model.

    Attributes:
        owner: the module whose method says it.
        tower: what encodes.
        readers: what reads the tower, in the order of the calls; not the tower itself or the language model.
        projectors: paths, from the owner, of what maps its features.
        fault: why nothing of the tower can be steered, though what the language model reads of it can; empty where it can.
    """

    owner: Any
    tower: Any
    readers: tuple[Reader, ...] = ()
    projectors: tuple[str, ...] = ()
    fault: str = ""


def way_of(model: Any, modality: str) -> Way | str:
    """How a modality reaches the language model, or why it does not by way of an encoder."""
    kind, heard = type(model).__name__, HEARD[modality]
    if not any(_takes(module, modality) for module in model.modules()):
        return f"{kind} takes no {heard}"
    reason = (
        f"{kind} takes {heard}, but no module of this one encodes them: its configuration leaves the {modality} encoder out, "
        "or they enter the language model without one"
    )
    alone: Way | None = None
    for owner, method in _owners(model, modality):
        flow, words = follow(owner, method, _named(owner, method, modality)).calls, _words(owner)
        tower = _tower(owner, flow, modality, words)
        if tower is None:
            continue
        module = owner.get_submodule(tower)
        if reads_encoder(model) and _kind_takes(type(module), ("ids",)) and _takes(module, modality):
            return f"in {kind} one encoder reads {heard} and words together, so that an aligner would steer both"
        if any(call.part in words and call.reads(tower) for call in flow):
            why = f"{kind} turns {heard} into tokens of its vocabulary, and no gradient comes back through their numbers"
            return Way(owner, module, fault=why)
        readers, chain = _readers(owner, tower, flow, words, method)
        if method != "forward" and not readers:  # what its features are mapped by may stand in the forward
            readers, chain = _readers(owner, tower, follow(owner, "forward").calls, words, "forward")
        if not readers and not stack_in(module).layers:
            alone = alone or Way(owner, module, fault=f"{heard} enter {kind} by {type(module).__name__} alone, which has no layers")
            continue
        if not readers and not _speaks(model):  # a head alone comes after it
            stack = stack_in(module)
            module = module.get_submodule(stack.path.rpartition(".")[0])
        return Way(owner, module, readers, chain)
    return alone or reason


def _speaks(model: Any) -> bool:
    """Whether a language model reads what is encoded."""
    return reads_encoder(model) or any(_kind_takes(type(module), ("ids",)) for module in model.modules())


def _takes(module: Any, modality: str) -> bool:
    """Whether a module's forward names an argument that a modality comes in."""
    return _kind_takes(type(module), PERCEIVED[modality])


_TAKEN: dict[type, frozenset[str]] = {}
"""Names of the arguments of each class's forward: models have many modules, and few classes."""


def _kind_takes(kind: type, words: tuple[str, ...]) -> bool:
    if kind not in _TAKEN:
        forward = method_of(kind, "forward")
        _TAKEN[kind] = frozenset() if forward is None else frozenset(inspect.signature(forward).parameters)
    return any(name in _TAKEN[kind] for word in words for name in ARGUMENTS[word])


def _named(owner: Any, method: str, modality: str) -> tuple[str, ...]:
    """What a method calls the arguments of a modality."""
    function = method_of(type(owner), method)
    taken = () if function is None else function.__code__.co_varnames[: function.__code__.co_argcount]
    return tuple(name for word in PERCEIVED[modality] for name in ARGUMENTS[word] if name in taken)


def _owners(model: Any, modality: str) -> Iterator[tuple[Any, str]]:
    """Modules whose methods say how a modality is encoded, the likeliest first."""
    for method in FEATURES[modality]:
        having = [module for module in model.modules() if method_of(type(module), method) is not None]
        if having:
            yield having[-1], method
            return
    taking = [module for module in model.modules() if _takes(module, modality)]
    encoder = model.get_encoder() if reads_encoder(model) else None
    around = [own for own in taking if encoder is not None and own is not encoder and encoder in set(own.modules())]
    holding = [own for own in taking if own not in around and _words(own)]
    ours = type(model).__module__.rpartition(".")[0]
    others = [own for own in taking if own not in around and own not in holding and type(own).__module__.startswith(ours)]
    for module in (*reversed(around), *reversed(holding), *others):
        yield module, "forward"


def _words(owner: Any) -> set[str]:
    """Paths of the input embeddings; what Whisper's classifier calls by that name is the convolution that its ear begins with."""
    try:
        words = owner.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return set()
    if isinstance(words, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        return set()
    return {path for path, module in owner.named_modules(remove_duplicate=False) if module is words}


def _tower(owner: Any, calls: Sequence[Call], modality: str, words: set[str]) -> str | None:
    """The called part that encodes: as the model says, or else the first with layers that reads pixels or sounds, or the first."""
    language = _language(calls, words)
    parts = list(dict.fromkeys(call.part for call in calls if call.part not in language))
    said: list[Any] = []
    for ask in ({"modality": modality}, {}):
        try:
            said.append(owner.get_encoder(**ask))
        except (AttributeError, NotImplementedError, ValueError, TypeError):
            continue
    reading = {call.part for call in calls if any(part.startswith("=") for part in call.parts)}
    layered = [part for part in parts if stack_in(owner.get_submodule(part)).layers]
    ranked = [
        *(part for module in said for part in parts if owner.get_submodule(part) is module),
        *(part for part in layered if part in reading),
        *(layered if not reading else ()),
        *(part for part in parts if part in reading or not reading),
    ]
    return next(iter(ranked), None)


def _language(calls: Sequence[Call], words: set[str]) -> set[str]:
    """Called parts that hold the input embeddings, read words, or what those make of them."""
    found = {call.part for call in calls if any(f"{path}.".startswith(f"{call.part}.") for path in words)}
    while more := {call.part for call in calls if call.part not in found and call.parts & found}:
        found |= more
    return found


def _readers(
    owner: Any, tower: str, calls: Sequence[Call], words: set[str], method: str
) -> tuple[tuple[Reader, ...], tuple[str, ...]]:
    """What reads a tower, and the parts that map what it gives; a head that nothing of the language model reads is none."""
    language, inside = _language(calls, words), f"{tower}."
    others = [call for call in calls if call.part != tower and call.part not in language]
    first = [(call, read) for call in others if (read := _reads(call, tower)) is not None]
    chain: list[str] = []
    for call in others:
        if call.part not in chain and call.parts & {*chain, tower}:
            chain.append(call.part)
    if method == "forward":
        spoken = {part for call in calls if call.part in language for part in call.parts}
        if not spoken & set(chain):
            return (), ()
    readers = [
        Reader(
            call.part,
            at,
            frozenset(own.field for own in dict(call.arguments)[at] if own.part == tower),
            came.reshaped,
        )
        for call, (at, came) in first
        if not isinstance(owner.get_submodule(call.part), nn.Embedding)
    ]
    mapping = [part for part in chain if not part.startswith(inside) and not is_norm(owner.get_submodule(part))]
    return tuple(readers), tuple(mapping) if readers else ()


def _reads(call: Call, tower: str) -> tuple[int | str, Came] | None:
    found = call.reads(tower)
    return None if found is None or "cache" in found[1].field else found
