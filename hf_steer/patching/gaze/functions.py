"""Our attention functions in one model: under which names its steered modules look them up, and over which implementations.

Users may set another implementation after patching. Masks are then made for that one, so what steers has to lie over it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch

from hf_steer.attention import BACKENDS, STEERABLE, attend_for, fit_bias, recording_attention, registered_name
from hf_steer.errors import PatchError
from hf_steer.ground.attention_call import called_by_name, declared_unknown, steered_function
from hf_steer.ground.implementations import (
    SWITCH,
    function_of,
    implementation_of,
    is_ours,
    register_function,
    rename_function,
)
from hf_steer.patching.edits import SetAttentionFunction
from hf_steer.patching.gaze.receipt import heed_pass, refuse_lost
from hf_steer.patching.planned import Plan
from hf_steer.patching.unchanged import Place


class Functions:
    """What the steered attention modules of one model call.

    Attributes:
        implementations: that the model runs, of decoder and tower.
        names: class of modules -> what those in the decoder look up.
        eyes: what the blocks of the tower that are read look up.
        unfit: why the modules call what they called before patching, and nothing can be steered; empty where it can.
    """

    def __init__(self, plan: Plan, places: Sequence[Place]) -> None:
        self.plan = plan
        self.places = tuple(place for place in places if place.site.takes is None)
        self.first = self.running()
        self.settle()

    def settle(self) -> None:
        """Names over what the model runs now."""
        anatomy = self.plan.anatomy
        self.implementations = self.running()
        decoder, tower = map(str, self.implementations)
        kinds = tuple(dict.fromkeys(type(place.site.module) for place in self.places))
        family = anatomy.family
        self.names = {
            kind: registered_name(decoder, "gaze", f"{family}_{kind.__name__}" if len(kinds) > 1 else family) for kind in kinds
        }
        self.eyes = "" if anatomy.tower is None else registered_name(tower, "eyes", anatomy.tower.config.model_type)
        self.unfit = self._why_unfit()
        if self.unfit:
            self.names, self.eyes = dict.fromkeys(kinds, decoder), tower

    def running(self) -> tuple[str | None, str | None]:
        """The implementations that decoder and tower run; None for a tower that is not there."""
        decoder, tower = self.plan.anatomy.decoder, self.plan.anatomy.tower
        return implementation_of(decoder.config), None if tower is None else implementation_of(tower.config)

    def _why_unfit(self) -> str:
        """Of a model that was steerable when it was patched: why it is not now, and what to do; empty where it is."""
        (decoder, tower), (decided, saw) = self.implementations, self.first
        part, now, was = "decoder", decoder, str(decided)
        eyes = {type(site.module) for site in self.plan.eyes}
        if self.plan.anatomy.carried == "mask" and now != was:
            fault = f"it gets its bias with its mask, as {was!r} takes it"
        elif self.names and not _can_wrap(now, self.names):
            fault = f"hf_steer can steer {', '.join(STEERABLE)}"
        elif eyes and not _can_wrap(tower, eyes):
            part, now, was, fault = "vision tower", str(tower), str(saw), f"hf_steer can watch {', '.join(STEERABLE)}"
        else:
            return ""
        return (
            f"the {part} runs attention implementation {now!r} since it was set after patching, and {fault}. Set one that it can, "
            f"such as {SWITCH}({was!r}), or run inside disable_steering(model)."
        )

    def register(self) -> None:
        """Make our functions known in this process; a registry entry changes no model."""
        decoder, tower = map(str, self.implementations)
        for kind, name in self.names.items():
            if is_ours(name):
                inner = function_of(decoder, kind)
                declared_unknown(inner)  # looked up before anything is compiled, and so are the backends
                len(BACKENDS)
                unheard = refuse_lost if self.plan.anatomy.carried == "keyword" else heed_pass
                function = steered_function(attend_for, fit_bias, unheard, inner=inner, implementation=decoder)
                register_function(name, function)
        if self.plan.eyes and is_ours(self.eyes):
            inner = function_of(tower, type(self.plan.eyes[0].module))
            register_function(self.eyes, called_by_name(partial(recording_attention, inner=inner)))

    def edits(self) -> Iterator[SetAttentionFunction]:
        """All that is changed."""
        for place in self.places:
            name = self.names[type(place.site.module)]
            yield SetAttentionFunction(place.site.module, name, layer=place.site.index, sees=self.plan.sees)
        for site in self.plan.eyes:
            yield SetAttentionFunction(site.module, self.eyes)

    def follow(self) -> None:
        """Go with a model that runs another implementation than when this was last looked at.

        Raises:
            PatchError: it is being compiled, when nothing can be registered.
        """
        if torch.compiler.is_compiling():
            now, was = self.running(), self.implementations
            raise PatchError(
                f"the attention implementation was {was[0]!r} when this model last ran and is {now[0]!r} now (vision tower: "
                f"{was[1]!r}, now {now[1]!r}), and a model that is being compiled cannot go over to it. Set it before patching: "
                f"unpatch_model(model); {SWITCH}(...); patch_model(model, config)."
            )
        self.settle()
        self.register()
        for place in self.places:
            rename_function(place.site.module, self.names[type(place.site.module)])
        for site in self.plan.eyes:
            rename_function(site.module, self.eyes)


def _can_wrap(implementation: str | None, kinds: Iterable[type]) -> bool:
    try:
        return implementation in STEERABLE and all(callable(function_of(implementation, kind)) for kind in kinds)
    except (AttributeError, KeyError):  # a class without a function of that name
        return False
