"""Sources that look at the prompt as the decoder gets it: one function per name, each a raw score for every token.

To add one, write a function of a `Sight` and add its row to `SOURCES`, and its name to `config.attention.PROMPT_SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Sight:
    """One prompt at the decoder's door.

    Attributes:
        embeds: `(rows, tokens, features)` inputs of the decoder: text, and pictures or sounds among it.
        text: `(rows, tokens)` bool: real tokens that are no placeholders.
        attend: runs the decoder up to its last grounding head; `(rows, tokens)` attention that each token receives.
        slope: runs the decoder forwards and backwards; `(rows, tokens, features)` gradient of the answer's logit.
    """

    embeds: Tensor
    text: Tensor
    attend: Callable[[], Tensor]
    slope: Callable[[], Tensor]


def _feature_norm(sight: Sight) -> Tensor:
    """Length of what the projector hands on."""
    norms: Tensor = sight.embeds.float().norm(dim=-1)
    return norms


def _text_similarity(sight: Sight) -> Tensor:
    """Mean cosine between a token and the prompt's text tokens: its cosine with the mean of their directions."""
    directions = F.normalize(sight.embeds.float(), dim=-1)
    text = sight.text[..., None].to(directions.dtype)
    mean = (directions * text).sum(1) / text.sum(1).clamp(min=1)
    return torch.einsum("btf,bf->bt", directions, mean)


def _decoder_attention(sight: Sight) -> Tensor:
    """What the grounding heads look at from the prompt's last tokens."""
    return sight.attend()


def _gradient(sight: Sight) -> Tensor:
    """Gradient × input of the answer's logit (https://arxiv.org/abs/1704.02685): how far a token speaks for the answer."""
    return (sight.slope() * sight.embeds).float().sum(-1)


SOURCES: Mapping[str, Callable[[Sight], Tensor]] = MappingProxyType(
    {
        "feature_norm": _feature_norm,
        "text_similarity": _text_similarity,
        "decoder_attention": _decoder_attention,
        "gradient": _gradient,
    }
)
