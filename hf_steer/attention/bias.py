"""From scores, strengths and gates to the low-rank bias that the backends carry."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_steer.values import HeadBias, TokenScores


def head_bias(scores: TokenScores, strength: Tensor, gate: Tensor | None, *, preserve_mass: bool) -> HeadBias:
    """The bias of one layer, `g_q · (λ_h · s_k - c_hg)`.

    `c_hg = log mean_k exp(λ_h s_k)` over the keys of each group g when the group's mass is to be kept, else 0. It is
    constant per head and group, so each group adds one column to the rank and no queries × keys tensor appears.

    Args:
        scores: normalised, `(batch, keys)`.
        strength: λ per query head, `(heads,)`.
        gate: `(batch, queries)` in [0, 1]; None for 1 everywhere.
        preserve_mass: see above.
    """
    query = strength[None, :, None, None]
    key = scores.values[..., None]
    if preserve_mass and (count := int(scores.group.max()) + 1) > 0:
        member = torch.nn.functional.one_hot(scores.group.clamp(min=0), count) * (scores.group >= 0)[..., None]
        shift = _log_mean_exp(scores.values, strength, member.to(key.dtype))
        key = torch.cat([key, member.to(key.dtype)], dim=-1)
        query = torch.cat([query.expand(len(shift), -1, -1, -1), -shift[:, :, None, :]], dim=-1)
    if gate is not None:
        query = query * gate[:, None, :, None]
    return HeadBias(query, key)


def _log_mean_exp(values: Tensor, strength: Tensor, member: Tensor) -> Tensor:
    """`(batch, heads, groups)`: log of the mean of `exp(λ s)` over the keys of each group."""
    bias = strength[None, :, None] * values[:, None, :]
    top = bias.amax(-1, keepdim=True)
    total = torch.einsum("bhk,bkg->bhg", torch.exp(bias - top), member)
    return total.clamp(min=torch.finfo(total.dtype).tiny).log() + top - member.sum(1).clamp(min=1).log()[:, None, :]
