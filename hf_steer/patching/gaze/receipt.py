"""The receipt of a pass: every layer that was to be steered has added its bias, or an error says which has not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_steer.errors import PatchError
from hf_steer.ground.attention_call import layer_of
from hf_steer.ground.implementations import sees_by_itself
from hf_steer.patching.blocks import steerings_with
from hf_steer.patching.passes import Pass, live_pass
from hf_steer.patching.scopes import OFF, SAID, STATEMENT, scope_of
from hf_steer.patching.unchanged import Place, refuse_replaced, still_there


def refuse_unsigned(missing: list[int], decoder: nn.Module, root: nn.Module, places: tuple[Place, ...]) -> None:
    """PatchError for layers that were to be steered in a pass and were not, and why, unless the model no longer has them.

    Args:
        missing: layers that have not signed.
        decoder: that has run.
        root: of the model.
        places: of the steered layers.
    """
    there = missing
    if not torch.compiler.is_compiling():
        refuse_replaced(place for place in places if place.site.index in missing)
        there = [place.site.index for place in still_there(decoder, root, places) if place.site.index in missing]
    if there:
        raise PatchError(
            f"layers {there} were to be steered in this pass and were not: their attention did not come to hf_steer's function. A "
            "wrapper or another library has replaced their forward, or they did not run, or a decoder that hands no keywords on "
            "was compiled. Patch the model after such changes, leave these layers out of attention.heads, run it uncompiled or "
            "with its layers compiled one by one, or run inside disable_steering(model)."
        )


def refuse_lost(module: Any, options: Mapping[str, Any]) -> None:
    """A steered module is called without the keyword: right where nothing is steered; else somebody dropped it.

    Args:
        module: of the layer.
        options: that it is called with.

    Raises:
        PatchError: the layer was to be steered.
    """
    if torch.compiler.is_compiling():
        return
    current = pass_around(module)
    if current is None:
        _refuse_stray(module, options)
    elif layer_of(module) in current.biases:
        raise PatchError(
            f"layer {layer_of(module)} was to be steered, and its attention was called without the keyword 'hf_steer' that carries "
            "the bias: something between decoder and attention (a hook, a wrapper, a layer with a forward of its own) does not "
            "hand keyword arguments on. Let it pass **kwargs through, or run inside disable_steering(model)."
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what a thread is in cannot be read in a graph
def heed_pass(module: Any, options: Mapping[str, Any], *, sees: bool | None = None) -> Pass | None:
    """The pass that a steered module runs in, for decoders that hand no keyword on; None where nothing is steered.

    Args:
        module: of the layer.
        options: that it is called with.
        sees: whether the model's own eyes steer it when nobody says anything; None where its configuration tells.

    Raises:
        PatchError: it runs outside of any pass, and was to be steered.
    """
    current = pass_around(module)
    if current is None:
        _refuse_stray(module, options, sees)
    return current


def pass_around(module: Any) -> Pass | None:
    """The innermost pass of this thread whose decoder has begun, of the model that the module is steered for."""
    current = live_pass()
    while current is not None and not (current.arrived and module in current.steering.gaze.covers):
        current = current.outer
    return current


def _refuse_stray(module: Any, options: Mapping[str, Any], sees: bool | None = None) -> None:
    """A steered attention module runs in no pass that the decoder's hooks saw: PatchError where it was to be steered.

    A checkpoint that backward recomputes runs with the arguments of its pass, whatever is said around backward. What the call
    itself says is among the options where no hook has taken it.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    own = [steering for steering in steerings_with(SAID, OFF) if module in steering.gaze.covers]
    said = options.get(STATEMENT) is not None or any(not scope_of(steering).off for steering in own)
    sees = sees_by_itself(module.config) if sees is None else sees
    by_itself = not own and sees and not torch.is_grad_enabled()  # checkpoints are recomputed anywhere
    if said or by_itself:
        raise PatchError(
            "a steered attention layer runs outside of any pass that hf_steer's hooks saw, so it is not steered: the hooks of the "
            "decoder were removed, or the layer is called by itself. Patch the model again (hf_steer.unpatch_model, then "
            "patch_model), or run inside disable_steering(model)."
        )
