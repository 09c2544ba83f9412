"""From scores, strengths and gates to the bias of every steered layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_steer.attention import head_bias
from hf_steer.ground.caches import keys_seen
from hf_steer.patching.gaze.memory import CacheState
from hf_steer.patching.planned import Strengths
from hf_steer.values import HeadBias, TokenScores


def make_biases(
    state: CacheState, strengths: Strengths, *, cache: Any, queries: int, gate: Tensor | None, preserve_mass: bool
) -> dict[int, HeadBias]:
    """Layer -> bias over the keys that the layer is about to attend to.

    Args:
        state: for the rows of this pass.
        strengths: layer -> λ per query head.
        cache: as the decoder gets it, before it is updated; None without one.
        queries: tokens of this pass.
        gate: `(rows, queries)`, None for 1 everywhere.
        preserve_mass: whether each group keeps its share of attention.
    """
    windows: dict[tuple[int, int], tuple[TokenScores, dict[Any, Any]]] = {}
    biases: dict[tuple[tuple[int, int], tuple[float, ...] | int], HeadBias] = {}
    by_layer = {}
    for (layer, values), place in zip(strengths.items(), keys_seen(cache, queries, strengths), strict=True):
        if place not in windows:
            length, offset = place
            windows[place] = state.window(offset, length), {}
        same = (place, layer if isinstance(values, Tensor) else values)
        if same not in biases:
            scores, key_forms = windows[place]
            strength, shift = state.strength(values, preserve_mass=preserve_mass)
            biases[same] = head_bias(scores, strength, shift, gate, key_forms)
        by_layer[layer] = biases[same]
    return by_layer
