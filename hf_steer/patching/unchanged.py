"""Whether what patching put in place is still there: a module, config or hook that was replaced since would steer nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

from hf_steer.errors import PatchError
from hf_steer.ground.implementations import implementation_of, is_ours
from hf_steer.ground.parts import Site

AGAIN = "Take the steering back first, change the model, and patch it again: hf_steer.unpatch_model(model), then patch_model."


@dataclass(frozen=True)
class Place:
    """Where a steered attention module hangs.

    Attributes:
        site: the module.
        parent: what holds it.
        child: under which name.
    """

    site: Site
    parent: nn.Module
    child: str


def place_of(root: nn.Module, site: Site) -> Place:
    """The place of a module in the model."""
    parent, _, child = site.name.rpartition(".")
    return Place(site, root.get_submodule(parent), child)


def refuse_replaced(places: Iterable[Place]) -> None:
    """PatchError where a module, or its config, is no longer the one that was patched."""
    for place in places:
        there: Any = place.parent._modules.get(place.child)
        if there is not None and there is not place.site.module:
            kind = type(there).__name__
            raise PatchError(f"{place.site.name} was replaced by a {kind} after patching, which is not steered. {AGAIN}")
        # those with a hook instead of a function sign the receipt, or miss it
        if place.site.takes is None and not is_ours(name := implementation_of(place.site.module.config)):
            raise PatchError(
                f"the config of {place.site.name} was replaced after patching, or its attention implementation was set: it names "
                f"{name!r} and no longer hf_steer's function. {AGAIN}"
            )


def still_there(decoder: nn.Module, root: nn.Module, places: Iterable[Place]) -> tuple[Place, ...]:
    """Those of the places that this model still runs: a pipeline stage has given layers away.

    Raises:
        PatchError: a layer was replaced by another one.
    """
    reachable = set(decoder.modules())
    ours = {place.site.module for place in places}
    kept = []
    for place in places:
        if place.site.module in reachable:
            kept.append(place)
            continue
        try:
            now = root.get_submodule(place.site.name)
        except AttributeError:
            continue
        if now not in ours:
            raise PatchError(f"{place.site.name} is not the module that was patched; its layer was replaced. {AGAIN}")
    return tuple(kept)


def refuse_running(root: nn.Module, act: str) -> None:
    """PatchError while another thread runs the model: half of its passes would be steered.

    Args:
        root: of the model.
        act: what is refused, such as `"patch"`.
    """
    frames = sys._current_frames()
    frames.pop(threading.get_ident())  # which would hold itself, and with it the model, until the collector comes
    parts = set(root.modules()) if frames else set()
    for top in frames.values():
        frame: FrameType | None = top
        while frame is not None:
            if frame.f_code.co_name in ("generate", "_call_impl") and _self_of(frame) in parts:
                raise PatchError(
                    f"cannot {act} this model while another thread runs it: some of its passes would be steered and others not. "
                    "Wait until that call has ended."
                )
            frame = frame.f_back


def _self_of(frame: Any) -> Any:
    """The module whose method a frame runs."""
    found = frame.f_locals.get("self")
    return found if isinstance(found, nn.Module) else None
