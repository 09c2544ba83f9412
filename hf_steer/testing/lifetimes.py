"""What is promised of patching itself: taken back, failed, copied, saved; and of statements and caches."""

from __future__ import annotations

import copy
import gc
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from typing import Any

from hf_steer.config import SteerConfig
from hf_steer.ground.caches import caches_after
from hf_steer.io import load_steering, save_steering
from hf_steer.patching import disable_steering, make_plan, unpatch_model, use_saliency
from hf_steer.patching.handle import Steering
from hf_steer.saliency import Saliency
from hf_steer.testing.report import CannotShow, Finding
from hf_steer.testing.subject import Subject, all_of, equal


class _Stopped(Exception):
    """The failure that is injected."""


def switched_off(subject: Subject) -> Finding:
    """Inside `disable_steering`."""
    with subject.patched(subject.config) as model:
        subject.stir()
        with disable_steering(model):
            return equal(subject.logits(subject.said), subject.plain)


def unpatched(subject: Subject) -> Finding:
    """After it was patched, and ran."""
    with subject.patched(subject.config):
        subject.stir()
        subject.logits(subject.said)
    return all_of(_as_before(subject), equal(subject.logits(), subject.plain))


def failed_patch(subject: Subject) -> Finding:
    """A failure after each change that patching makes."""
    plan = make_plan(subject.model, subject.config, subject.tokenizer)
    number = len(list(Steering(plan).edits()))
    for reached in range(1, number + 1):
        with suppress(_Stopped), ExitStack() as edits:
            for edit in islice(Steering(plan).edits(), reached):
                edits.enter_context(edit)
            raise _Stopped
        finding = _as_before(subject)
        if not finding.holds:
            return finding
    return all_of(equal(subject.logits(), subject.plain), Finding(True, note=f"{number} changes"))


def _as_before(subject: Subject) -> Finding:
    changes = subject.changes()
    return Finding(not changes, note="; ".join(changes[:5]))


def saved(subject: Subject) -> Finding:
    """Saved, taken back, and patched from the files."""
    return through_files(subject, subject.stir, subject.patched, subject.logits)


def through_files(
    subject: Any, wake: Callable[[], None], again: Callable[[SteerConfig], Any], anew: Callable[[Any], Any]
) -> Finding:
    """Written to a temporary folder, taken off, and patched from the files.

    Args:
        subject: that is checked.
        wake: lets fresh parameters be far from fresh.
        again: patches its model with what a file says.
        anew: logits of that.
    """
    with tempfile.TemporaryDirectory(prefix="hf_steer_") as folder:
        with subject.patched(subject.config) as model:
            wake()
            expected = subject.logits(subject.said)
            save_steering(model, folder)
        with again(SteerConfig.from_pretrained(folder)) as model:
            if subject.config.has_weights:
                load_steering(model, folder)
            return equal(anew(subject.said), expected)


def copied(subject: Subject) -> Finding:
    """A deepcopy of the patched model, and what is left when one of the two is unpatched."""
    if not subject.copies:
        raise CannotShow("copies=False")
    with subject.patched(subject.config) as model:
        subject.stir()
        expected = subject.logits(subject.said)
        twin = copy.deepcopy(model)
    after = equal(subject.logits(), subject.plain, "the original after unpatching it")
    with _speaking(twin, subject.said):
        steered = equal(subject.logits(model=twin), expected, "the copy after unpatching the original")
    return all_of(after, steered, equal(subject.logits(model=unpatch_model(twin)), subject.plain, "the copy after unpatching it"))


@contextmanager
def _speaking(model: Any, said: Saliency | None) -> Iterator[None]:
    with ExitStack() as block:
        if said is not None:
            block.enter_context(use_saliency(model, said))
        yield


def statement(subject: Subject) -> Finding:
    """The buffer that it was made from is written to, and blocks are closed in another order than they were opened."""
    first, second = subject.tokens_said(1), subject.tokens_said(2)
    if first.tokens is None:
        raise CannotShow("the inputs hold no token numbers")
    buffer = first.tokens.clone()
    from_buffer = Saliency.from_tokens(buffer)
    buffer.zero_()
    with subject.patched(subject.silent) as model:
        kept = equal(subject.logits(from_buffer), subject.logits(first), "after its buffer was written to")
        expected = subject.logits(second)
        with ExitStack() as outer, ExitStack() as inner:
            outer.enter_context(use_saliency(model, first))
            inner.enter_context(use_saliency(model, second))
            outer.close()
            still = equal(subject.logits(), expected, "in the block that is still open")
        return all_of(kept, still, equal(subject.logits(), subject.plain, "after all blocks"))


def freed(subject: Subject) -> Finding:
    """By reference count alone; the collector is off meanwhile."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        if not _is_freed(subject, None):
            raise CannotShow("the unpatched model's caches are not freed either")
        with subject.patched(subject.gaze):
            return Finding(_is_freed(subject, subject.said), note="the cache of a generate, when its output is dropped")
    finally:
        if was_on:
            gc.enable()


def _is_freed(subject: Subject, said: Saliency | None) -> bool:
    out = subject.generate(said)
    references = [weakref.ref(cache) for cache in caches_after(None, out)]
    if not references:
        raise CannotShow("generate gives no cache back")
    del out
    return all(reference() is None for reference in references)
