"""A patch that is taken off for a while: what steers stays what it is, with all that it has learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from hf_steer.patching.edits import SetTrainable
from hf_steer.patching.handle import Steering, note_in_force
from hf_steer.patching.scopes import steering_of
from hf_steer.patching.unchanged import refuse_running


@contextmanager
def lifted(model: Any) -> Iterator[Any]:
    """Unpatch a model inside the block. Afterwards the same steering is in force: the same object, the same parameters.

    Args:
        model: patched, inside wrappers or not.

    Yields:
        The model inside of all wrappers.

    Raises:
        PatchError: not patched, or another thread runs it.
    """
    steering: Steering = steering_of(model)
    root = steering.plan.anatomy.root
    refuse_running(root, "unpatch")
    trained = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    order = [(hooks, list(map(called_by, hooks.values()))) for hooks in _hooks_in(root)]
    try:
        steering.undo.close()
        steering.release()
        yield root
    finally:
        _put_back(steering, trained)
        for hooks, before in order:
            _sort(hooks, before)


def _put_back(steering: Steering, trained: list[tuple[nn.Parameter, bool]]) -> None:
    """All its edits again; undoing them restores what was there without them."""
    steering.gaze.owner, steering.aligners.owner = (steering,), (steering,)
    steering.gaze.functions.register()
    with ExitStack() as edits:
        edits.enter_context(SetTrainable([(own, said) for own, said in trained if own.requires_grad != said]))
        for edit in steering.edits():
            edits.enter_context(edit)
        steering.undo = edits.pop_all()
    note_in_force(steering)


def called_by(hook: Any) -> Any:
    """What a hook calls, to be compared: a partial, or a bound method, of the same is another object each time."""
    return (hook.func, hook.args) if isinstance(hook, partial) else hook


def _hooks_in(root: nn.Module) -> Iterator[Any]:
    for module in root.modules():
        yield module._forward_pre_hooks
        yield module._forward_hooks


def _sort(hooks: Any, wanted: list[Any]) -> None:
    """Ours go where they were: others may have put theirs before them since the model was patched."""
    left = {number: called_by(hook) for number, hook in hooks.items()}
    for own in wanted:
        number = next((number for number, hook in left.items() if hook == own), None)
        if number is not None:
            del left[number]
            hooks.move_to_end(number)
