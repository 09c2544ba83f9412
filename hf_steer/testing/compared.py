"""Two ways to compute the same, steered: as close as they are without steering, with room for rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_steer.config import SteerConfig
from hf_steer.saliency import Saliency
from hf_steer.testing.report import CannotShow, Finding
from hf_steer.testing.subject import Subject, largest

LEAST = 1e-4
"""Of the largest value: other orders of summation in a few layers of float32."""
EPSILONS = 8
"""Of the weights' type, of the largest value: the same in half precision, whose rounding alone is one of them."""
TIMES_PLAIN = 4
"""Steering sharpens attention, and with it the model's own deviation, which is measured."""
MOST_OF_PLAIN = 25
"""More than so many times what rounding makes is a fault of the model's own, beside which nothing can be seen."""
Ways = Callable[[Saliency | None], tuple[Tensor, Tensor]]
"""From what is said to the same thing computed in two ways."""


def as_close_as_plain(subject: Subject, ways: Ways, *, config: SteerConfig, said: Saliency | None, exact: bool = False) -> Finding:
    """Compute both unpatched, then both patched.

    Args:
        subject: not patched.
        ways: is called with None for the unpatched model, then with what is said.
        config: of the patched model.
        said: what steers it.
        exact: bit by bit, where the unpatched model is.

    Raises:
        CannotShow: the two are not the same without steering, either, or cannot be computed.
    """
    try:
        plain, expected = ways(None)
    except CannotShow:
        raise
    except Exception as error:  # which is no fault of what steers
        raise CannotShow(f"the unpatched model itself fails here ({type(error).__name__}: {error})") from error
    own = largest(plain - expected)
    if not own <= MOST_OF_PLAIN * bar_for(subject, expected, 0.0):
        raise CannotShow(f"the unpatched model's own results in these two ways are {own:.3g} apart")
    with subject.patched(config):
        found, expected = ways(said)
    return within(subject, found, expected, own, exact=exact)


def within(subject: Subject, found: Tensor, expected: Tensor, own: float, *, exact: bool = False, note: str = "") -> Finding:
    """Whether two results agree, given how far apart the unpatched model's are."""
    error, bar = largest(found - expected), 0.0 if exact and own == 0 else bar_for(subject, expected, own)
    return Finding(error <= bar, error, bar, note)


def bar_for(subject: Subject, expected: Tensor, own: float) -> float:
    """How far from the expected values rounding may lead, given how far the unpatched model is from its own."""
    dtype = subject.model.dtype if subject.model.dtype.is_floating_point else torch.float32
    return TIMES_PLAIN * own + max(LEAST, EPSILONS * torch.finfo(dtype).eps) * largest(expected)
