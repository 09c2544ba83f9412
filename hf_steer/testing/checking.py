"""One promise on one model: what came of it, whatever happened, and the model as it was."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hf_steer.errors import ConfigError
from hf_steer.testing.promises import Promise
from hf_steer.testing.report import CannotShow, Check, Finding
from hf_steer.testing.subject import Subject


def wanted(only: Sequence[str] | None, promises: Mapping[str, Promise]) -> list[str]:
    """Names of the promises that are asked for, in the order of the table; all of them for None.

    Raises:
        ConfigError: one that the table does not have.
    """
    if only is None:
        return list(promises)
    unknown = [name for name in only if name not in promises]
    if unknown:
        near = difflib.get_close_matches(unknown[0], promises, 1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"the contract has no promise {unknown[0]!r}{guess}; it has {', '.join(promises)}.")
    return [name for name in promises if name in only]


def check(name: str, promise: Promise, subject: Subject) -> Check:
    """Whether a promise is kept, and whether looking for it has left the model as it was."""
    try:
        finding = promise.find(subject)
        changes = subject.changes()
        if finding.holds and changes:
            finding = Finding(False, note=f"afterwards the model was not as before: {'; '.join(changes[:5])}")
    except CannotShow as reason:
        return Check(name, promise.says, None, why=str(reason))
    except Exception as error:  # a model may fail in any way, and that it fails is what is looked for
        finding = Finding(False, note=f"{type(error).__name__}: {error}")
    return Check(name, promise.says, finding.holds, finding.error, finding.bar, finding.note)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode, then each module's own again; and the random numbers that come next are those that would have come."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices if device.index is not None]):
        try:
            yield model.eval()
        finally:
            for module, training in modes:
                module.training = training
