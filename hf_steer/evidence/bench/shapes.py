"""The models whose attention is timed: their sizes, and random weights of those sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers

VOCABULARY = 2048
"""Of every timed model: a full one would hide attention behind the embedding, and so flatter whatever is slow there."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        name: as on the command line.
        family: transformers' classes that build it, `"qwen2"` or `"llama"`.
        hidden: features of a token.
        heads: query heads.
        key_value_heads: of keys and values.
        head_dim: features of a head.
        intermediate: features inside the MLP.
        layers: of the whole model.
    """

    name: str
    family: str
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    layers: int

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer, without its norms."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.key_value_heads)
        return attention + 3 * self.hidden * self.intermediate


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape("seed", "llama", 4096, 32, 32, 128, 11008, 32),  # 32 heads are given; the rest is Llama-2-7B's
            Shape("qwen2-vl-2b", "qwen2", 1536, 12, 2, 128, 8960, 28),
            Shape("qwen2-vl-7b", "qwen2", 3584, 28, 4, 128, 18944, 28),
            Shape("llama-8b", "llama", 4096, 32, 8, 128, 14336, 32),
            Shape("llama-1b", "llama", 2048, 32, 8, 64, 8192, 16),  # Llama 3.2: pastalib takes no Qwen2
            Shape("tiny", "llama", 64, 4, 2, 16, 96, 2),
        )
    }
)
_CLASSES = {"qwen2": ("Qwen2Config", "Qwen2ForCausalLM"), "llama": ("LlamaConfig", "LlamaForCausalLM")}


def make_model(shape: Shape, *, layers: int, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """A text decoder of this shape with random weights, in evaluation mode and frozen, its attention `"sdpa"`."""
    config_class, model_class = (getattr(transformers, name) for name in _CLASSES[shape.family])
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1 << 17,
        initializer_range=shape.hidden**-0.5,  # attention far from uniform, so that an error in it shows
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = model_class._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.eval().requires_grad_(False)
