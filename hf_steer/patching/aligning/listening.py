"""Who listens to the aligners: to their routing, and to the losses that keep their experts in use."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hf_steer.aligners import Routing
from hf_steer.patching import scopes


class Listener(scopes.Listener):
    """Sums of the routing statistics of the passes since it was last read.

    Attributes:
        sums: name such as `"image.output/experts/usage"` -> sum over passes.
        passes: how often each name was heard.
    """

    follows_routing = True

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.passes: dict[str, int] = {}

    def routed(self, place: str, routing: Routing, mask: Tensor | None) -> None:
        """Add one pass, without asking the device for a number."""
        for name, read in (("usage", routing.usage), ("load", routing.load), ("entropy", routing.entropy)):
            for router, value in read(mask).items():
                key = f"{place}/{router}/{name}"
                self.sums[key] = self.sums.get(key, 0) + value.detach()
                self.passes[key] = self.passes.get(key, 0) + 1

    def read(self) -> dict[str, list[float] | float]:
        """Means since the last reading: usage and load per expert, entropy in nats; empty when nothing was heard."""
        means: dict[str, list[float] | float] = {key: (value / self.passes[key]).tolist() for key, value in self.sums.items()}
        self.sums, self.passes = {}, {}
        return means


class Balance(scopes.Listener):
    """The weighted load-balancing losses of passes without labels.

    Attributes:
        losses: one per router and pass, with its gradient.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def loss(self) -> Tensor:
        """Their sum since it was last asked for, to be added to a loss of one's own; 0 where there were none."""
        terms, self.losses[:] = list(self.losses), []
        device = terms[0].device if terms else None
        return torch.stack([term.float().to(device) for term in terms]).sum() if terms else torch.zeros(())


def record_routing(model: Any) -> AbstractContextManager[Listener]:
    """Listen to the routing of this model's aligners inside the block, in this thread.

    Args:
        model: a patched model, wrapped or not.

    Returns:
        A block that gives a `Listener`; its `read()` gives the means since the last reading.

    Raises:
        PatchError: the model is not patched.
    """
    return scopes.listen(model, Listener())


def collect_balance(model: Any) -> AbstractContextManager[Balance]:
    """Collect the routers' load-balancing losses of training steps whose labels do not go through the model.

    With labels they join the model's own loss. A loss of one's own (label smoothing, `compute_loss_func`, distillation) adds
    them itself: `with collect_balance(model) as balance: output = model(**inputs)`, then `loss + balance.loss()`.

    Args:
        model: a patched model, wrapped or not.

    Returns:
        A block that gives a `Balance`.

    Raises:
        PatchError: the model is not patched.
    """
    return scopes.listen(model, Balance())
