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
from hf_steer.ground.arguments import PERCEIVED, name_of, spelling_in, unknown_masks
from hf_steer.ground.attention_call import SEGMENTS
from hf_steer.ground.caches import ROW_MOVES, unknown_moves
from hf_steer.ground.decoders import reads_encoder
from hf_steer.ground.implementations import CONTINUOUS_BATCHING, function_of, implementation_of, unknown_batching
from hf_steer.ground.parts import Anatomy, Site
from hf_steer.ground.versions import tested_range, warn_untested


class Planned(Protocol):
    """What is to be patched, as far as it is looked at here."""

    @property
    def anatomy(self) -> Anatomy: ...

    @property
    def gazes(self) -> bool: ...

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


def _root_takes(plan: Planned) -> str | None:
    """A model whose token numbers are an encoder's is told its decoder's under other names."""
    if reads_encoder(plan.anatomy.root):
        return _takes("root", "decoder_ids", "cache")(plan)
    parameters = inspect.signature(inspect.unwrap(type(plan.anatomy.root).forward)).parameters.values()
    further = any(own.kind is own.VAR_KEYWORD for own in parameters)
    return _takes("root", "ids", "mask", *(() if further else ("embeds", "cache")))(plan)


def _finds_functions(plan: Planned) -> str | None:
    for part, sites in ((plan.anatomy.decoder, plan.anatomy.layers[:1]), (plan.anatomy.tower, plan.eyes[:1])):
        for site in sites:
            if site.takes is not None:  # its attention calls none
                continue
            name = implementation_of(part.config)
            try:
                function_of(name, type(site.module))
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
    """As the likeness has shown when the model was resolved."""
    odd = [f"{name}: {why}" for name, why in plan.anatomy.left_out.items()]
    return None if plan.anatomy.layers else "; ".join(odd) or "no attention was called"


def _batches(plan: Planned) -> str | None:
    root = type(plan.anatomy.root)
    unknown = unknown_batching(root)
    return f"{root.__name__} has {', '.join(unknown)} beside {', '.join(CONTINUOUS_BATCHING)}" if unknown else None


def _tells_pictures(plan: Planned) -> str | None:
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    if plan.anatomy.arrangement is not None or SEGMENTS in inspect.signature(_flash_attention_forward).parameters:
        return None
    return f"flash attention takes no {SEGMENTS}"


def _tells_frames(plan: Planned) -> str | None:
    """A mask of sounds under a name that is not known would let padding pass for sound."""
    ear, root = plan.anatomy.encoders.get("audio"), plan.anatomy.root
    if ear is None or ear.mask is not None:
        return None
    unknown = unknown_masks(root)
    known = name_of("mel_mask")
    return f"{type(root).__name__}.forward takes no {known}, but {', '.join(unknown)}" if unknown else None


def _perceives(plan: Planned) -> str | None:
    root = plan.anatomy.root
    if any(spelling_in(root, word) is not None for word in PERCEIVED):
        return None
    return f"{type(root).__name__}.forward takes pictures and sounds under none of our names"


ASSUMPTIONS: tuple[Assumption, ...] = (
    Assumption("decoder_arguments", "a decoder takes token numbers, embeddings, a mask and a cache", "gaze",
               _takes("decoder", "ids", "embeds", "mask", "cache", "keeps_cache")),
    Assumption("root_arguments", "a model takes token numbers, embeddings, a mask and a cache", "gaze",
               _root_takes),
    Assumption("attention_functions", "an attention implementation's function is registered, or lies in the model's file", "gaze",
               _finds_functions),
    Assumption("cache_methods", "caches tell length and sizes, and move rows by methods that are known", "gaze", _moves_rows),
    Assumption("steered_pass", "a prompt and a step after it come to the attention functions, with their keys", "gaze",
               _arrives),
    Assumption("continuous_batching", "continuous batching begins in methods that are known", "gaze", _batches),
    Assumption("tower_arguments", "a vision tower is told the grids of its pictures", "eyes",
               lambda plan: None if plan.anatomy.arrangement is not None else _takes("tower", "grids")(plan)),
    Assumption("picture_segments", "flash attention is told where the pictures of a call begin in its one row", "eyes",
               _tells_pictures),
    Assumption("perceived_arguments", "pictures and sounds come under names that are known", "aligners", _perceives),
    Assumption("sound_masks", "which frames of a sound are real comes under a name that is known", "aligners", _tells_frames),
)  # fmt: skip
"""What patching relies on; `tests/ground/test_survey.py` holds each row on every version."""


def needs(plan: Planned) -> tuple[str, ...]:
    """Which parts of the table a plan relies on."""
    parts = {"gaze": plan.gazes, "eyes": bool(plan.eyes), "aligners": bool(plan.aligners)}
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
