"""The same prompt with padding before it, with tokens after it, or with another last token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.ground.arguments import Given, with_changes
from hf_steer.ground.decoders import reads_encoder
from hf_steer.saliency import Saliency
from hf_steer.testing.report import CannotShow
from hf_steer.testing.subject import Subject


def padded(subject: Subject, count: int) -> dict[str, Any]:
    """So many padding tokens before each row: another of the prompt's words, so that a mask that is not heeded shows."""
    ids, special = ids_of(subject), _placeholders(subject)
    words = ids[mask_of(subject).bool() & ~torch.isin(ids, special)]
    ids = F.pad(ids, (count, 0), value=int(words[0]) if len(words) else 0)
    longer = {name: F.pad(value, (count, 0)) for name, value in _per_token(subject).items()}
    return with_changes(subject.model, Given({**subject.inputs, **longer}), ids=ids, mask=F.pad(mask_of(subject), (count, 0)))


def continued(subject: Subject, sequences: Tensor) -> dict[str, Any]:
    """The prompt and what was generated after it."""
    count = sequences.shape[1] - ids_of(subject).shape[1]
    longer = {name: F.pad(value, (0, count)) for name, value in _per_token(subject).items()}
    mask = F.pad(mask_of(subject), (0, count), value=1)
    return with_changes(subject.model, Given({**subject.inputs, **longer}), ids=sequences, mask=mask)


def with_other_end(subject: Subject) -> dict[str, Any]:
    """Each row's last token is another one of the prompt's words; CannotShow where it is padding, or stands for a picture."""
    ids, mask = ids_of(subject), mask_of(subject).bool()
    special = _placeholders(subject)
    words = ids[mask & ~torch.isin(ids, special)]
    changed = ids.clone()
    for row in range(len(ids)):
        others = words[words != ids[row, -1]]
        if not bool(mask[row, -1]) or bool(torch.isin(ids[row, -1], special)) or not len(others):
            raise CannotShow("the last token of a row is padding, or no word; pad on the left, and end with text")
        changed[row, -1] = others[0]
    return with_changes(subject.model, Given(dict(subject.inputs)), ids=changed)


def shifted(subject: Subject, said: Saliency | None, *, before: int = 0, after: int = 0) -> Saliency | None:
    """The same statement about a prompt with more tokens, of which nothing is said."""
    if said is None or said.tokens is None or subject.attention.attends == "cross":
        return said
    return Saliency.from_tokens(F.pad(said.tokens, (before, after)))


def ids_of(subject: Subject) -> Tensor:
    """Token numbers of the prompt."""
    ids = subject.given.ids
    if subject.anatomy.decoder is not None and reads_encoder(subject.anatomy.root):
        raise CannotShow("the token numbers of the inputs are those of an encoder, which looks both ways")
    if subject.anatomy.decoder is None or not isinstance(ids, Tensor):
        raise CannotShow("there is no prompt of token numbers in the inputs")
    return ids


def mask_of(subject: Subject) -> Tensor:
    """Which tokens are real; all of them where nothing is said."""
    mask, ids = subject.given.mask, ids_of(subject)
    if isinstance(mask, Tensor) and mask.shape != ids.shape:
        raise CannotShow("the mask is not one value per token")
    return mask if isinstance(mask, Tensor) else torch.ones_like(ids)


def _placeholders(subject: Subject) -> Tensor:
    """Tokens that stand for a picture, video or sound."""
    ids = ids_of(subject)
    return torch.tensor(list(subject.anatomy.placeholder_ids.values()), dtype=ids.dtype, device=ids.device)


def _per_token(subject: Subject) -> Mapping[str, Tensor]:
    """All inputs that have one value per token."""
    shape = ids_of(subject).shape
    return {name: value for name, value in subject.inputs.items() if isinstance(value, Tensor) and value.shape == shape}
