"""How raw scores are scaled: one function per name, each on the scores of one group (a picture, a frame, a text)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from hf_steer.config import AttentionConfig
from hf_steer.config.manners import AUTO, Manner
from hf_steer.errors import SaliencyError
from hf_steer.values import TokenScores

_FLAT = 1e-6
"""Spread, relative to the largest score, below which scores count as constant: above it, rounding would be amplified."""
_FAR = 5.0
"""Robust standard deviations from the median beyond which a score is an outlier."""
_FEW = 0.25
"""Largest share of outliers: heavy-tailed attention has up to a fifth that far out; more are what the scores say."""
_NORMAL = 1.4826
"""Standard deviations per median absolute deviation, in a normal distribution."""


def _zscore(scores: Tensor, clip: float) -> Tensor:
    return ((scores - scores.mean()) / scores.std(unbiased=False)).clamp(-clip, clip)


def _without_outliers(scores: Tensor, clip: float) -> Tensor:
    """Pull a few far outliers to the edge of what is not far. Clipping z-scores alone comes too late: two tokens of a few
    hundred set the mean and the deviation of all. Without outliers nothing changes, nor where there are but two values: then
    the median deviation is 0, or nothing is far."""
    median = scores.median()
    spread = _NORMAL * (scores - median).abs().median()
    reach = max(_FAR, clip) * spread
    outliers = ((scores - median).abs() > reach).float().mean()
    if spread <= _FLAT * scores.abs().max() or outliers > _FEW:
        return scores
    return scores.clamp(median - reach, median + reach)


def _minmax(scores: Tensor, clip: float) -> Tensor:
    return (scores - scores.min()) / (scores.max() - scores.min())


def _rank(scores: Tensor, clip: float) -> Tensor:
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    average = last - (counts + 1) / 2
    ranks: Tensor = average[inverse] / max(len(scores) - 1, 1)
    return ranks.to(scores.dtype)


NORMALIZERS: Mapping[str, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {"zscore": _zscore, "minmax": _minmax, "rank": _rank}
)


def normalize(scores: TokenScores, method: str, clip: float, *, winsorize: bool = True) -> TokenScores:
    """Scale each group of each row by itself, or by `"maxabs"` each row.

    Args:
        scores: `(batch, keys)` values and their groups.
        method: a key of `NORMALIZERS`: `zscore` (clipped), `minmax` and `rank` (both into [0, 1], ties averaged); `maxabs`: the
            largest absolute score of a row becomes 1 and 0 stays 0; `none`.
        clip: largest absolute z-score.
        winsorize: before a z-score, pull a few far outliers in: beyond 5 (or `clip`, if that is more) robust standard
            deviations from the median, and a quarter of the group at most. Regions that a user draws mean their peaks.

    Returns:
        The same groups with scaled values. Under a key of `NORMALIZERS` constant scores become zeros; NaN never comes of it.
    """
    if method == "none":
        return scores
    if method == "maxabs":
        largest = scores.values.abs().amax(1, keepdim=True)
        return replace(scores, values=scores.values / torch.where(largest > 0, largest, 1.0))
    scaled = _scaled_in_graph if torch.compiler.is_compiling() else _scaled
    values = scaled(scores.values, scores.group, method, clip, winsorize)
    return TokenScores(values, scores.group, scores.groups)


def put_into_effect(scores: TokenScores, attention: AttentionConfig, manner: Manner, kind: str) -> TokenScores:
    """Raw scores in the manner of their kind, a key of `MANNERS`; groups that need not keep their mass are none."""
    winsorize = kind in ("tokens", "source")  # regions that a user draws mean their peaks
    scores = normalize(scores, manner.normalize, attention.saliency.clip, winsorize=winsorize)
    group, groups = (scores.group, scores.groups) if manner.preserve_mass else (torch.full_like(scores.group, -1), 0)
    if attention.share is not None:  # in or out: what has more than half of the largest score is pointed at
        _refuse_turned_away(scores.values)
        enough = 0.5 * scores.values.amax(1, keepdim=True).clamp(min=0.0)
        return TokenScores((scores.values > enough).to(scores.values.dtype), group, groups)
    usual = torch.full_like(scores.values, manner.strength) if attention.strength == AUTO else None
    return TokenScores(scores.values, group, groups, usual)


def is_lost(scores: TokenScores, manner: Manner) -> bool:
    """Whether raw scores say the same of all tokens of a group, and the manner leaves nothing of that: they move nothing there."""
    if torch.compiler.is_compiling() or not (manner.preserve_mass or manner.normalize in NORMALIZERS):
        return False
    for values, group in zip(scores.values, scores.group, strict=True):
        for number in torch.unique(group[group >= 0]).tolist():
            own = values[group == number]
            if own.any() and own.max() - own.min() <= _FLAT * own.abs().max():
                return True
    return False


def _refuse_turned_away(values: Tensor) -> None:
    """SaliencyError for a row that is only looked away from, which no share can say."""
    if not torch.compiler.is_compiling() and bool(((values < 0).any(1) & ~(values > 0).any(1)).any()):
        raise SaliencyError(
            "attention.share raises the attention to what scores above 0, and no score of a row is: they all turn the gaze away. "
            "Give what is to be looked at scores above 0, or patch with a strength instead of share=."
        )


def _scaled(values: Tensor, group: Tensor, method: str, clip: float, winsorize: bool) -> Tensor:
    result = torch.zeros_like(values)
    for row in range(values.shape[0]):
        for number in torch.unique(group[row]).tolist():
            if number < 0:
                continue
            members = group[row] == number
            own = values[row][members]
            if own.max() - own.min() > _FLAT * own.abs().max():
                own = _without_outliers(own, clip) if winsorize and method == "zscore" else own
                result[row, members] = NORMALIZERS[method](own, clip)
    return result


_scaled_in_graph = torch.library.custom_op("hf_steer::normalize", _scaled, mutates_args=())
"""The same as one node of a compiled graph: which tokens form a group is known only when it runs."""


@_scaled_in_graph.register_fake
def _(values: Tensor, group: Tensor, method: str, clip: float, winsorize: bool) -> Tensor:
    return torch.empty_like(values)
