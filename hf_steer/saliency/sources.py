"""The sources of saliency, a row each: out of the model's own eyes, or out of the prompt as the decoder gets it.

To add one, write a function of a `Sight`, or of what the tower's blocks attend with, and add its row here, and a test; for one
of your own outside of hf_steer see `docs/extending/source.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_steer.registry import Source
from hf_steer.saliency.eyes import averaged, rolled_out


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


OURS: Mapping[str, Source] = MappingProxyType(
    {
        "vision_attention": Source(eyes=averaged),
        "vision_rollout": Source(eyes=rolled_out, blocks="all"),
        "feature_norm": Source(prompt=_feature_norm),
        "text_similarity": Source(prompt=_text_similarity),
        "decoder_attention": Source(
            prompt=_decoder_attention, options={"source_heads": None, "last_tokens": None}, reads_heads=True
        ),
        "gradient": Source(prompt=_gradient, options={"answer_token": None}),
    }
)
