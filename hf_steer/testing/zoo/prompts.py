"""The words that a decoder reads, in a batch of the zoo: all at once, or a beginning and then one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from hf_steer.ground.arguments import spelling_in
from hf_steer.testing.zoo.inputs import Batch

SOURCE_WORDS = ("input_ids", "attention_mask", "bbox", "pixel_values")
"""What the encoder of an encoder-decoder reads, which is no part of the prompt."""


def prompt_name(model: Any) -> str:
    """The argument that holds the decoder's own words."""
    return "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"


def mask_of(model: Any, batch: Batch) -> Tensor:
    """Which words are real: `(rows, tokens)`."""
    mask: Tensor = batch["decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"]
    return mask.bool()


def beginning(model: Any, batch: Batch, tokens: int) -> Batch:
    """The same batch, as if its prompts ended after so many tokens; without a mask, since nothing is padded."""
    whole = batch[prompt_name(model)].shape[1]
    source = SOURCE_WORDS if model.config.is_encoder_decoder else ()
    cut = {
        name: value[:, :tokens]
        if isinstance(value, Tensor) and name not in source and value.ndim > 1 and value.shape[1] == whole else value
        for name, value in batch.items()
    }  # fmt: skip
    return {name: value for name, value in cut.items() if name != prompt_name(model).replace("input_ids", "attention_mask")}


def next_word(model: Any, batch: Batch, position: int, left: Any, cache: Any) -> Batch:
    """One word after a beginning.

    Args:
        model: of the zoo.
        batch: the whole.
        position: of the word.
        left: what the pass before it gave back; what the encoder made is handed on.
        cache: of that pass.
    """
    word = batch[prompt_name(model)][:, position : position + 1]
    encoded = getattr(left, "encoder_last_hidden_state", None)
    again = {} if encoded is None else {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded)}
    return {**again, prompt_name(model): word, _cache_name(model): cache}


def _cache_name(model: Any) -> str:
    """What this model, or else its decoder, calls what holds the keys."""
    parts = (model, model.get_decoder(), model.base_model)
    return next(name for name in (spelling_in(part, "cache") for part in parts) if name)
