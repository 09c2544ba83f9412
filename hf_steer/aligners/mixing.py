"""Whether a kind of aligner that somebody else added lets one token's features reach another's."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from hf_steer.aligners.routers import OURS
from hf_steer.config import AlignerConfig

TOKENS = 5
SPREAD = 0.3
"""Of the numbers that are put in place of its parameters: fresh, an aligner changes nothing, and so shows nothing."""


def mixes_tokens(config: AlignerConfig, size: int) -> bool:
    """Tried on one built for the purpose, with random parameters: another first token, and do the others come out otherwise?

    Args:
        config: of an aligner.
        size: of a feature.

    Returns:
        False for the kinds that hf_steer brings, which steer each token by itself, and, with a warning, where it refuses to run on
        a few random features on the CPU. What else it raises goes through.
    """
    if OURS.get(config.kind) is config.row:
        return False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = config.row.build(config, size, 2).to("cpu", torch.float32).eval()
        for parameter in module.parameters():
            parameter.normal_(0.0, SPREAD)
        try:
            return _mixes(module, size, (1,) if config.row.own_layers else ())
        except (RuntimeError, ValueError, AssertionError) as error:  # made for one device, or for features of some shape
            warnings.warn(
                f"an aligner of kind {config.kind!r} cannot be tried on {TOKENS} random features on the CPU "
                f"({type(error).__name__}: {error}), so whether it lets padding and other rows into a token is not known. It must "
                "steer each token by itself, or be a row with reads_text=True, which is handed masks.",
                stacklevel=2,
            )
            return False


def _mixes(module: nn.Module, size: int, layer: tuple[int, ...]) -> bool:
    features = torch.randn(1, TOKENS, size)
    changed = features.clone()
    changed[:, 0] += torch.randn(size)
    one, other = (module(own, *layer) for own in (features, changed))
    return bool((_beyond_rounding(one[:, 1:], other[:, 1:])).any())


def _beyond_rounding(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs() > 1e-5 * one.abs().amax()
