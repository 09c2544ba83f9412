"""What was found in a model, and why, in words: its attention site by site, what else its layers are, its eyes and ears."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hf_steer.ground.parts import Anatomy, Site
from hf_steer.ground.settings import has_setting
from hf_steer.ground.structure import stack_of

CARRIED = {
    "keyword": "as a keyword that the decoder hands on to its attention",
    "pass": "out of the pass that runs in the thread, since this decoder drops keywords; not with gradient checkpointing",
    "mask": "with the mask that its attention is called with, since that calls no function that can be exchanged",
}


def describe(anatomy: Anatomy) -> dict[str, Any]:
    """Part -> what it is and where, in the order in which it is printed."""
    names = {module: name or "(the model itself)" for name, module in anatomy.root.named_modules()}
    told: dict[str, Any] = {}
    if anatomy.decoder is None:
        told["decoder"] = f"none: {anatomy.reason}"
    else:
        told["decoder"] = f"{names[anatomy.decoder]} ({type(anatomy.decoder).__name__})"
        told |= _attention(anatomy)
    told |= _encoders(anatomy, names)
    told["boxes, seconds"] = _places(anatomy)
    return told


def sites_of(anatomy: Anatomy) -> tuple[dict[str, Any], ...]:
    """Every attention that can be steered, one by one."""
    every = [("self", anatomy.layers, anatomy.carried), ("cross", anatomy.crosses, anatomy.carried_across)]
    return tuple(
        {
            "attends": attends, "layer": site.index, "path": site.name, "class": type(site.module).__name__, "heads": site.heads,
            "key_value_heads": site.key_value_heads, "cache_slot": site.slot, "carried": carried,
        }
        for attends, sites, carried in every
        for site in sites
    )  # fmt: skip


def _attention(anatomy: Anatomy) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if anatomy.layers:
        told["layers"] = f"{len(anatomy.layers)}: {span_of(anatomy.layers)} ({_classes(anatomy.layers)})"
        numbers = [site.index for site in anatomy.layers]
        if numbers != list(range(len(numbers))):
            told["numbered"] = ranges(numbers)
        told["heads per layer"] = _heads(anatomy.layers, anatomy.head_dim)
        told["bias comes"] = CARRIED[anatomy.carried]
        others = other_layers(anatomy)
        if others:
            told["other layers"] = "; ".join(f"{ranges(numbers)}: {kind}" for kind, numbers in others.items())
    if anatomy.crosses:
        told["cross-attention"] = f"{len(anatomy.crosses)}: {span_of(anatomy.crosses)} ({_classes(anatomy.crosses)})"
        told["heads across"] = _heads(anatomy.crosses, 0)
        told["bias across"] = CARRIED[anatomy.carried_across]
    if anatomy.left_out:
        told["left out"] = "; ".join(f"{name}: {why}" for name, why in anatomy.left_out.items())
    return told


def _heads(sites: Sequence[Site], size: int) -> str:
    """Query and key heads, once where all layers have the same."""
    counts: dict[tuple[int, int], list[int]] = {}
    for site in sites:
        counts.setdefault((site.heads, site.key_value_heads), []).append(site.index)
    of = f", of {size} features" if size else ""
    if len(counts) == 1:
        ((query, key),) = counts
        return f"{query} query, {key} key/value{of}"
    return "; ".join(f"{query} query, {key} key/value in {ranges(own)}" for (query, key), own in counts.items())


def other_layers(anatomy: Anatomy) -> dict[str, list[int]]:
    """What the layers are that lie among those that attend, and do not: kind -> their numbers."""
    found: dict[str, list[int]] = {}
    for stack in dict.fromkeys(stack_of(site.name) for site in anatomy.layers):
        path = stack.partition(".*")[0]
        if "*" not in stack:
            continue
        layers = list(anatomy.root.get_submodule(path).children())
        attending = {_number(site.name, path) for site in anatomy.layers if site.name.startswith(f"{path}.")}
        usual = {type(child) for number in attending for child in layers[number].children()}
        for number, layer in enumerate(layers):
            if number not in attending:
                found.setdefault(_kind(layer, usual), []).append(number)
    return found


def _number(name: str, path: str) -> int:
    return int(name.removeprefix(f"{path}.").partition(".")[0])


def _kind(layer: Any, usual: set[type]) -> str:
    """What a layer has that those that attend have not, or else its class."""
    own = {type(child).__name__: None for child in layer.children() if type(child) not in usual}
    return ", ".join(own) or type(layer).__name__


def _encoders(anatomy: Anatomy, names: Any) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for modality, encoder in anatomy.encoders.items():
        places = ["output", "layers", *(["projector"] if encoder.projector is not None else [])]
        told[f"{modality} encoder"] = f"{names[encoder.tower]} ({type(encoder.tower).__name__})"
        told[f"{modality} layers"] = f"{len(encoder.layers)}: {span_of(encoder.layers)}, of {encoder.layer_size} features"
        if encoder.projector is not None:
            told[f"{modality} projector"] = f"{names[encoder.projector]} ({type(encoder.projector).__name__})"
        told[f"{modality} aligners"] = f"at {', '.join(places)}"
    if anatomy.tower is not None:
        told["vision tower"] = names[anatomy.tower]
        told["vision blocks"] = f"{len(anatomy.blocks)}: {span_of(anatomy.blocks)}"
        told["vision tokens"] = dict(anatomy.placeholder_ids)
        told["patches a token"] = anatomy.merge_size**2
    return told


def _places(anatomy: Anatomy) -> str:
    """Whether it is known where in a picture or sound a token lies."""
    if anatomy.layout is None and anatomy.frame_seconds is None:
        perceives = bool(anatomy.encoders) or any(has_setting(anatomy.root.config, word) for word in ("vision", "audio"))
        unknown = "it is not known where in a picture or sound its tokens lie: " if perceives else ""
        attends = anatomy.layers or anatomy.crosses
        return f"{unknown}text and token statements only" if attends else "no attention to steer by them"
    ways = []
    if anatomy.layout is not None:
        across = "" if anatomy.placeholder_ids else "the encoder's "
        placed = ", ".join(anatomy.placeholder_ids or anatomy.placed_across)
        ways.append(f"{across}{placed} {'positions' if across else 'tokens'} by layout {_named(anatomy.layout)}")
    if anatomy.frame_seconds is not None:
        ways.append(f"a position of the encoder is {anatomy.frame_seconds:g} seconds of sound")
    return "; ".join(ways)


def _named(layout: Any) -> str:
    return repr(layout) if isinstance(layout, str) else f"{layout.__module__}.{layout.__name__}"


def _classes(sites: Iterable[Site]) -> str:
    return ", ".join(dict.fromkeys(type(site.module).__name__ for site in sites))


def span_of(sites: Sequence[Site]) -> str:
    """The first and the last."""
    if not sites:
        return "none"
    return sites[0].name if len(sites) == 1 else f"{sites[0].name} ... {sites[-1].name}"


def ranges(numbers: Iterable[int]) -> str:
    """`0-2, 4` of 0, 1, 2, 4."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
