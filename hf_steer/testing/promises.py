"""The contract, one row per promise that one model and one batch can show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hf_steer.testing import aligners, backends, generation, lifetimes, passes
from hf_steer.testing.report import Finding
from hf_steer.testing.subject import Subject


@dataclass(frozen=True)
class Promise:
    """One row of the table.

    Attributes:
        says: the promise in a sentence.
        find: checks it on an unpatched model, and leaves it unpatched.
    """

    says: str
    find: Callable[[Subject], Finding]


PROMISES: Mapping[str, Promise] = MappingProxyType(
    {
        "zero strength": Promise("with strengths of 0 outputs are bit-equal", passes.zero_strength),
        "switched off": Promise("inside disable_steering outputs are bit-equal", lifetimes.switched_off),
        "nothing asked": Promise("where nobody says where to look outputs are bit-equal", generation.nothing_asked),
        "unpatched": Promise("unpatching restores all, and outputs are bit-equal", lifetimes.unpatched),
        "failed patch": Promise("a patch that fails leaves nothing behind", lifetimes.failed_patch),
        "steered": Promise("steering changes the output", passes.changed),
        "oracle": Promise("every backend agrees with a dense mask in float32", backends.oracle),
        "applied": Promise("what was asked is applied in every layer, or an error says where not", passes.applied),
        "partial match": Promise("a head, layer or score that is not there is an error", passes.partial_match),
        "padding": Promise("padding changes no output", passes.padding),
        "no leak": Promise("a later token changes no earlier output", passes.no_leak),
        "decoding": Promise("prompt and steps on a cache equal one pass", generation.decoding),
        "beams": Promise("beams are steered like their rows", generation.beams),
        "threads": Promise("several generations at once equal the same in turn", generation.threads),
        "saved": Promise("saved and loaded gives bit-equal outputs", lifetimes.saved),
        "copied": Promise("a deepcopy is independent", lifetimes.copied),
        "statement": Promise("a statement is a value, and ends with its block", lifetimes.statement),
        "freed": Promise("steered caches are freed as soon as plain ones", lifetimes.freed),
        "fresh aligners": Promise("fresh aligners leave outputs bit-equal", aligners.fresh),
        "learned aligners": Promise("aligners that have learned change the output", aligners.learned),
        "trained": Promise("gradients reach the aligners and nothing of the base", aligners.trained),
    }
)
"""Name -> promise, in the order of the report."""
