"""What is verified, one row per promise."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hf_steer.patching import use_strength
from hf_steer.testing import generation, passes
from hf_steer.testing.lifetimes import through_files
from hf_steer.testing.promises import Promise
from hf_steer.testing.report import CannotShow, Finding
from hf_steer.testing.subject import equal
from hf_steer.verify.backend import backend
from hf_steer.verify.receipt import receipt
from hf_steer.verify.remains import remains_of

BUDGET = 40
"""Forward passes of the language model that a verification takes at most, single tokens of `generate` included."""


def identity(subject: Any) -> Finding:
    """The gaze is there, and asked for with strength 0."""
    if subject.attention.share is not None:
        raise CannotShow("a gaze that keeps a share of attention has no strength that could be 0")
    with subject.gaze_alone() as model, use_strength(model, 0.0):
        found = subject.anew(subject.said)
    return as_plain(subject, found)


def undone(subject: Any) -> Finding:
    """What is left, and what comes out."""
    with subject.without_patch() as root:
        left = remains_of(root)
        if left:
            return Finding(False, note=f"left behind: {', '.join(left[:5])}")
        found = subject.anew()
    return as_plain(subject, found)


def saved(subject: Any) -> Finding:
    """Written to a temporary folder, taken off, and patched from the files."""
    if subject.config.train_projector:
        raise CannotShow("to load it would write to the projector, which is a part of the model")
    return through_files(subject, subject.wake, subject.repatched, subject.anew)


def fresh_aligners(subject: Any) -> Finding:
    """Just inserted, without the gaze; what was learned by others of their kind does not matter."""
    config = subject.aligned
    with subject.repatched(config):
        found = subject.anew()
    return as_plain(subject, found)


def as_plain(subject: Any, found: Any) -> Finding:
    """Bit by bit; CannotShow where the model's own results differ from call to call."""
    finding = equal(found, subject.plain)
    if not finding.holds and not equal(subject.anew_plain(), subject.anew_plain()).holds:
        raise CannotShow("the unpatched model gives something else each time it is called, so nothing can be equal bit by bit")
    return finding


PROMISES: Mapping[str, Promise] = MappingProxyType(
    {
        "identity": Promise("with strengths of 0 outputs are bit-equal", identity),
        "receipt": Promise("the heads that were named are steered, no others, and it shows", receipt),
        "backend": Promise("sampled heads agree with the formula in float64", backend),
        "no leak": Promise("a later token changes no earlier output", passes.no_leak),
        "padding": Promise("padding changes no output", passes.padding),
        "decoding": Promise("steps on a cache equal what is computed anew", generation.decoding),
        "beams": Promise("beams are steered like rows of their own", generation.beams),
        "saved": Promise("saved and loaded gives bit-equal outputs", saved),
        "aligners": Promise("fresh aligners leave outputs bit-equal", fresh_aligners),
        "undone": Promise("without the patch all is as before, and outputs are bit-equal", undone),
    }
)
"""Name -> promise, in the order of the table."""
