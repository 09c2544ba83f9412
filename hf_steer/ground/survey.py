"""What is assumed of transformers, one row each, and looked up in the model at hand before the first edit.

A release that changes one of these facts fails with the row's name: at patch time in `survey`, and in the test that goes
through the table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, Protocol

from hf_steer.errors import GroundError
from hf_steer.ground.arguments import PERCEIVED, spelling_in
from hf_steer.ground.attention_call import SEGMENTS
from hf_steer.ground.caches import ROW_MOVES, unknown_moves
from hf_steer.ground.implementations import CONTINUOUS_BATCHING, function_of, implementation_of, unknown_batching
from hf_steer.ground.parts import Anatomy, Site
from hf_steer.ground.proof import prove_keyword, takes_keywords
from hf_steer.ground.versions import tested_range, warn_untested


class Planned(Protocol):
    """What is to be patched, as far as it is looked at here."""

    @property
    def anatomy(self) -> Anatomy: ...

    @property
    def strengths(self) -> Sized: ...

    @property
    def eyes(self) -> tuple[Site, ...]: ...

    @property
    def aligners(self) -> Sized: ...


@dataclass(frozen=True)
class Assumption:
    """One fact about transformers that we rely on.

    Attributes:
        name: short, for tests and messages.
        says: the fact.
        needed_by: what relies on it: `"gaze"`, `"eyes"`, `"aligners"`.
        find: looks the fact up in what is to be patched; returns what is wrong, or None.
    """

    name: str
    says: str
    needed_by: str
    find: Callable[[Planned], str | None]


def _takes(part: str, *words: str) -> Callable[[Planned], str | None]:
    """The decoder, tower or root takes arguments under known names."""

    def find(plan: Planned) -> str | None:
        module: Any = getattr(plan.anatomy, part)
        if module is None:
            return None
        lacking = [word for word in words if spelling_in(module, word) is None]
        return f"{type(module).__name__}.forward names none of ours for {', '.join(lacking)}" if lacking else None

    return find


def _hands_on(plan: Planned) -> str | None:
    decoder = plan.anatomy.decoder
    return None if takes_keywords(type(decoder).forward) else f"{type(decoder).__name__}.forward takes no further keyword arguments"


def _names_its_function(plan: Planned) -> str | None:
    for site in plan.anatomy.layers:
        module: Any = site.module
        if not isinstance(getattr(module, "layer_idx", None), int) or not hasattr(module, "config"):
            return f"{site.name} ({type(module).__name__}) has no number or no config of its own"
    return None


def _finds_functions(plan: Planned) -> str | None:
    for part, sites in ((plan.anatomy.decoder, plan.anatomy.layers[:1]), (plan.anatomy.tower, plan.eyes[:1])):
        for site in sites:
            name = implementation_of(part.config)
            try:
                function_of(name, type(site.module).__module__)
            except (KeyError, AttributeError) as error:
                return f"no attention function {name!r} is found for {type(site.module).__name__} ({error})"
    return None


def _moves_rows(plan: Planned) -> str | None:
    from transformers import DynamicCache, StaticCache

    for kind in (DynamicCache, StaticCache):
        lacking = [name for name in (*ROW_MOVES, "get_seq_length", "get_mask_sizes") if not hasattr(kind, name)]
        unknown = unknown_moves(kind)
        said = [f"{what} {', '.join(names)}" for what, names in (("lacks", lacking), ("has unknown", unknown)) if names]
        if said:
            return f"{kind.__name__} {' and '.join(said)}"
    return None


def _arrives(plan: Planned) -> str | None:
    """Once per class of decoder and place of its attention: the likeness is the same."""
    decoder = plan.anatomy.decoder
    names = {module: name for name, module in decoder.named_modules()}
    attention = names.get(plan.anatomy.layers[0].module)
    if attention is None:
        return f"{plan.anatomy.layers[0].name} does not lie inside {type(decoder).__name__}"
    place = type(decoder), attention
    if place not in _PROVEN:
        fault = prove_keyword(decoder, attention, "hf_steer")
        if fault is not None:
            return fault
        _PROVEN.add(place)
    return None


_PROVEN: set[tuple[type, str]] = set()


def _batches(plan: Planned) -> str | None:
    root = type(plan.anatomy.root)
    unknown = unknown_batching(root)
    return f"{root.__name__} has {', '.join(unknown)} beside {', '.join(CONTINUOUS_BATCHING)}" if unknown else None


def _tells_pictures(plan: Planned) -> str | None:
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    if plan.anatomy.arrangement is not None or SEGMENTS in inspect.signature(_flash_attention_forward).parameters:
        return None
    return f"flash attention takes no {SEGMENTS}"


def _perceives(plan: Planned) -> str | None:
    root = plan.anatomy.root
    if any(spelling_in(root, word) is not None for word in PERCEIVED):
        return None
    return f"{type(root).__name__}.forward takes pictures and sounds under none of our names"


ASSUMPTIONS: tuple[Assumption, ...] = (
    Assumption("decoder_arguments", "a decoder takes token numbers, embeddings, a mask and a cache", "gaze",
               _takes("decoder", "ids", "embeds", "mask", "cache", "keeps_cache")),
    Assumption("root_arguments", "a model takes token numbers, embeddings, a mask and a cache", "gaze",
               _takes("root", "ids", "embeds", "mask", "cache")),
    Assumption("decoder_keywords", "a decoder hands on keyword arguments that it does not name", "gaze", _hands_on),
    Assumption("attention_modules", "an attention module has its layer's number, and a config that names its function", "gaze",
               _names_its_function),
    Assumption("attention_functions", "an attention implementation's function is registered, or lies in the model's file", "gaze",
               _finds_functions),
    Assumption("cache_methods", "caches tell length and sizes, and move rows by methods that are known", "gaze", _moves_rows),
    Assumption("steered_pass", "the keyword reaches the attention function in a prompt and in a step after it", "gaze", _arrives),
    Assumption("continuous_batching", "continuous batching begins in methods that are known", "gaze", _batches),
    Assumption("tower_arguments", "a vision tower is told the grids of its pictures", "eyes",
               lambda plan: None if plan.anatomy.arrangement is not None else _takes("tower", "grids")(plan)),
    Assumption("picture_segments", "flash attention is told where the pictures of a call begin in its one row", "eyes",
               _tells_pictures),
    Assumption("perceived_arguments", "pictures and sounds come under names that are known", "aligners", _perceives),
)  # fmt: skip
"""What patching relies on; `tests/ground/test_survey.py` holds each row on every version."""


def needs(plan: Planned) -> tuple[str, ...]:
    """Which parts of the table a plan relies on."""
    parts = {"gaze": bool(plan.strengths), "eyes": bool(plan.eyes), "aligners": bool(plan.aligners)}
    return tuple(name for name, wanted in parts.items() if wanted)


def survey(plan: Planned) -> None:
    """Look up everything that a plan relies on, before anything is touched.

    Raises:
        GroundError: all facts that do not hold, with the version of transformers and the tested range.
    """
    warn_untested()
    wanted = needs(plan)
    found = [(row, row.find(plan)) for row in ASSUMPTIONS if row.needed_by in wanted]
    faults = [f"{row.name} ({row.says}): {fault}" for row, fault in found if fault is not None]
    if faults:
        raise GroundError(
            f"this {type(plan.anatomy.root).__name__} cannot be steered with {tested_range()}. What hf_steer relies on and did not "
            f"find: {'; '.join(faults)}. Nothing was changed. Install a tested transformers, or update hf_steer."
        )
