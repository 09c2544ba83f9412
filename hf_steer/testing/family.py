"""The contract as a function: all promises, on a user's own model and inputs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hf_steer.config import SteerConfig
from hf_steer.errors import PatchError
from hf_steer.families import resolve
from hf_steer.ground.arguments import ARGUMENTS
from hf_steer.patching import get_steer_status
from hf_steer.saliency import Saliency
from hf_steer.testing.checking import check, evaluating, wanted
from hf_steer.testing.promises import PROMISES
from hf_steer.testing.report import ContractReport, facts_of
from hf_steer.testing.settled import settle
from hf_steer.testing.subject import Subject


def check_family(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    saliency: Saliency | None = None,
    config: SteerConfig | None = None,
    tokenizer: Any = None,
    copies: bool = True,
    only: Sequence[str] | None = None,
) -> ContractReport:
    """Check hf_steer's contract on a model and a batch of one's own. Afterwards the model is as it was.

    Each promise of `PROMISES` is checked by running the model unpatched and patched. What must be equal is compared bit by bit.
    Where the same is computed in two ways, the bar is 4 times what lies between the unpatched model's own results in these two
    ways, and 1e-4 of the largest value (in half precision 8 epsilons of the type). What a kill during a save leaves behind takes
    another process to see, and is not checked.

    Args:
        model: a transformers model of a known family, not patched, on any device.
        inputs: of its forward pass, as its processor makes them: two or three rows of unequal length, padded on the left, which end
            with text. Without a picture or a sound in them nothing is shown of aligners.
        saliency: what steers; when None its own eyes if it has some and the inputs hold a picture, else random scores.
        config: what is checked; when None a gaze of all heads, each with a strength of its own, and an aligner in each place that
            the model has. Strengths that are trainable, and 0 at first, count as 1 here.
        tokenizer: as for `patch_model`.
        copies: whether the model may be copied, once in float32. Without there is no oracle, and no check of copies.
        only: names of promises, of `PROMISES`; all when None.

    Returns:
        The report. It raises nothing for a broken promise: ask `report.passed`, or call `report.raise_if_failed()`.

    Raises:
        PatchError: the model is patched already, or of an unknown family.
        ConfigError: promises that are not there; saliency for a configuration without a gaze.
        SaliencyError: saliency that does not fit the inputs.
    """
    names = wanted(only, PROMISES)
    if get_steer_status(model).patched:
        raise PatchError("check_family takes a model that is not patched; call hf_steer.unpatch_model(model) first.")
    anatomy, begun = resolve(model), time.monotonic()
    with evaluating(model):
        config, said = settle(model, inputs, anatomy, config=config, saliency=saliency)
        own = {name: value for name, value in inputs.items() if name not in ARGUMENTS["labels"]}
        subject = Subject(model, own, anatomy, config, said, tokenizer, copies)
        subject.changes()  # notes what the model is, while nothing has been patched
        checks = tuple(check(name, PROMISES[name], subject) for name in names)
    return ContractReport(**facts_of(anatomy), seconds=time.monotonic() - begun, checks=checks)
