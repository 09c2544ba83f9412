"""From scores, strengths and gates to the low-rank bias that the backends carry."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from hf_steer.values import HeadBias, TokenScores

Form = TypeVar("Form")


def once(forms: dict[Hashable, Form], name: Hashable, make: Callable[[], Form], *sources: Tensor) -> Form:
    """What a backend makes of a bias, made once for all layers that share it.

    Not where gradients flow to what it is made of: checkpointing runs layers again and expects them to compute what they computed.
    """
    if any(source.requires_grad for source in sources):
        return make()
    if name not in forms:
        forms[name] = make()
    return forms[name]


def on_device(bias: HeadBias, device: torch.device) -> HeadBias:
    """The bias where the layer is: layers may be spread over devices. Each device gets its own copy once."""
    if bias.key.device == device:
        return bias
    moved: HeadBias = once(
        bias.forms, device, lambda: HeadBias(bias.query.to(device), bias.key.to(device), bias.share), bias.query, bias.key
    )
    return moved


def head_bias(
    scores: TokenScores,
    strength: Tensor,
    shift: Tensor | None,
    gate: Tensor | None,
    key_forms: dict[Hashable, Tensor] | None = None,
    *,
    soon: Tensor | None = None,
) -> HeadBias:
    """The bias of one layer, `g_q · (λ_h · s_k - c_hg)`.

    The shift is constant per head and group, so each group adds one column to the rank and no queries × keys tensor appears.

    Args:
        scores: normalised, `(batch, keys)`, of the keys that the layer attends to.
        strength: λ per query head, `(heads,)`.
        shift: c, `(batch, heads, groups)`, from `mass_shift`; None for 0.
        gate: `(batch, queries)` in [0, 1]; None for 1 everywhere.
        key_forms: shared by the layers that attend to these keys; see `HeadBias`.
        soon: the gate for keys that do not wait, where `scores` say which those are.
    """
    key_forms = {} if key_forms is None else key_forms
    if scores.waits is not None:
        own = (scores.only(scores.waits), gate), (scores.only(~scores.waits), soon)
        parts = tuple(head_bias(said, strength, shift, opened) for said, opened in own)
        rows, queries = (max(part.query.shape[at] for part in parts) for at in (0, 2))
        query = torch.cat([part.query.expand(rows, -1, queries, -1) for part in parts], dim=-1)
        return HeadBias(query, torch.cat([part.key for part in parts], dim=-1), key_forms=key_forms)
    query = strength[None, :, None, None]
    key = scores.values[..., None]
    if shift is not None:
        key = torch.cat([key, _members(scores, shift.shape[-1])], dim=-1)
        query = torch.cat([query.expand(len(shift), -1, -1, -1), -shift[:, :, None, :]], dim=-1)
    if gate is not None:
        query = query * gate[:, None, :, None]
    return HeadBias(query, key, key_forms=key_forms)


def mass_shift(scores: TokenScores, strength: Tensor) -> Tensor:
    """`c_hg = log mean_k exp(λ_h s_k)` over the keys of each group: subtracting it keeps the group's share of attention.

    Exact where the unsteered attention inside the group is uniform.

    Args:
        scores: normalised, `(batch, keys)`, of all keys of the groups.
        strength: λ per query head, `(heads,)`.

    Returns:
        `(batch, heads, groups)`.
    """
    member = _members(scores, scores.count_groups())
    bias = strength[None, :, None] * scores.values[:, None, :]
    top = bias.amax(-1, keepdim=True)
    total = torch.einsum("bhk,bkg->bhg", torch.exp(bias - top), member)
    return total.clamp(min=torch.finfo(total.dtype).tiny).log() + top - member.sum(1).clamp(min=1).log()[:, None, :]


def _members(scores: TokenScores, groups: int) -> Tensor:
    """`(batch, keys, groups)`: 1 where a key belongs to a group."""
    numbers = torch.arange(groups, device=scores.group.device)
    return (scores.group[..., None] == numbers).to(scores.values.dtype)
