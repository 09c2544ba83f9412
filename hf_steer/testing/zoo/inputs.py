"""A batch that a tiny model's forward pass takes: text, and pictures or sounds where it cannot do without."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_steer.testing.zoo.exceptions import IMAGE
from hf_steer.testing.zoo.models import START, sections

ROWS, TOKENS, SOURCE_TOKENS, PADDING = 2, 11, 14, 3
FIRST_WORD, LAST_WORD = 20, 200
"""Words are drawn from between these: no special tokens, and no placeholders."""
FRAMES, SAMPLES, SIDE_PX = 128, 1600, 32
Batch = dict[str, Any]


class Draw:
    """Random numbers for one batch.

    Attributes:
        words: `(rows, tokens)`.
        mask: of the words, 1 where they are real.
    """

    def __init__(self, tokens: int, padded: bool, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.words = self.of_words(tokens)
        self.mask = torch.ones_like(self.words)
        if padded:
            self.mask[1, :PADDING] = 0
            self.words = self.words * self.mask

    def of_words(self, tokens: int) -> Tensor:
        return torch.randint(FIRST_WORD, LAST_WORD, (ROWS, tokens), generator=self.generator)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=self.generator)



def reader(model: Any) -> Any:
    """The model, or the part of a composite without a forward pass of its own that reads and answers."""
    return getattr(model, "thinker", model)


def tiny_inputs(model: Any, *, tokens: int = TOKENS, padded: bool = False, seed: int = 1) -> Batch:
    """Two rows of prompts.

    Args:
        model: of the zoo.
        tokens: of each prompt.
        padded: the second row is shorter, and padded on the left.
        seed: of the words, pixels and samples.
    """
    draw = Draw(tokens, padded, seed)
    model = reader(model)
    config = model.config
    prefix = "decoder_" if config.is_encoder_decoder else ""
    if prefix and not padded:
        draw.words[:, 0] = START  # or `generate` puts it before them
    prompts = {f"{prefix}input_ids": draw.words, f"{prefix}attention_mask": draw.mask}
    batch: Batch = {name: value for name, value in prompts.items() if name in inspect.signature(model.forward).parameters}
    if f"{prefix}input_ids" not in batch:
        batch = {}  # its mask is that of a sound
    source = SOURCES.get(getattr(model, "main_input_name", ""))
    if source is not None:
        batch |= source(config, draw)
    elif config.is_encoder_decoder:
        batch |= {"input_ids": draw.of_words(SOURCE_TOKENS)}
    own = OWN.get(config.model_type)
    return batch if own is None else {name: value for name, value in own(config, batch, draw).items() if value is not None}


def _spectrum(config: Any, draw: Draw) -> Batch:
    found = (getattr(part, name, None) for part in sections(config) for name in BANDS)
    return {"input_features": draw.noise(FRAMES, next(bands for bands in found if bands))}


BANDS = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel")
SOURCES: Mapping[str, Callable[[Any, Draw], Batch]] = {
    "input_features": _spectrum,
    "input_values": lambda config, draw: {"input_values": draw.noise(SAMPLES)},
    "inputs": lambda config, draw: {"input_values": draw.noise(SAMPLES)},
    "pixel_values": lambda config, draw: {"pixel_values": draw.noise(3, SIDE_PX, SIDE_PX)},
}
"""The main input of a model -> what it perceives; all others read words."""


def _with_pictures_in_place(config: Any, batch: Batch, draw: Draw) -> Batch:
    """BLIP-2's kind: placeholders for the queries, behind the padding."""
    words = batch["input_ids"].clone()
    words[:, PADDING : PADDING + config.num_query_tokens] = IMAGE
    asked = {} if config.model_type == "blip-2" else {"qformer_input_ids": draw.of_words(5)}
    pixels = batch["pixel_values"]
    return {**batch, **asked, "input_ids": words, "pixel_values": pixels[:, None] if "video" in config.model_type else pixels}


def _kosmos(config: Any, batch: Batch, draw: Draw) -> Batch:
    place = torch.zeros_like(draw.words)
    place[:, PADDING : PADDING + config.latent_query_num] = 1
    return {**batch, "image_embeds_position_mask": place}


def _patches(config: Any, batch: Batch, draw: Draw) -> Batch:
    """Pix2Struct's: the row and column of each patch before its pixels."""
    places = torch.arange(SOURCE_TOKENS).float()[None, :, None].expand(ROWS, -1, 2)
    pixels = draw.noise(SOURCE_TOKENS, config.vision_config.patch_embed_hidden_size)
    return {**batch, "input_ids": None, "flattened_patches": torch.cat([places, pixels], -1)}


def _boxes(config: Any, batch: Batch, draw: Draw) -> Batch:
    """UDOP's: where on the page each word stands, and the page."""
    corners = torch.rand(ROWS, SOURCE_TOKENS, 4, generator=draw.generator).cumsum(-1) / 4
    return {**batch, "bbox": corners, "pixel_values": draw.noise(3, SIDE_PX, SIDE_PX)}


def _codes(config: Any, batch: Batch, draw: Draw) -> Batch:
    """Kyutai's: a word and the codes of a moment of sound for each token."""
    codes = config.num_codebooks + 1
    return {**batch, "input_ids": (draw.words % (config.codebook_vocab_size - 5))[..., None].expand(-1, -1, codes)}


def _whole_window(config: Any, batch: Batch, draw: Draw) -> Batch:
    """Whisper's: always as many frames as it has positions for, two each."""
    frames = draw.noise(config.num_mel_bins, 2 * config.max_source_positions)
    return {**batch, "input_features": frames} if "input_features" in batch else batch


def _codebooks(config: Any, batch: Batch, draw: Draw) -> Batch:
    """MusicGen's: the codes of each codebook as a row."""
    return {**batch, "input_ids": draw.words.repeat_interleave(getattr(config, "decoder", config).num_codebooks, 0)}


OWN: Mapping[str, Callable[[Any, Batch, Draw], Batch]] = {
    "blip-2": _with_pictures_in_place,
    "blt": lambda config, batch, draw: {**batch, "use_cache": False},  # its configuration has no number of layers for a cache
    "dia": lambda config, batch, draw: {
        **batch, "decoder_input_ids": draw.words[..., None].expand(-1, -1, config.decoder_config.num_channels)
    },
    "idefics": lambda config, batch, draw: {
        **batch, "pixel_values": draw.noise(1, 3, SIDE_PX, SIDE_PX), "image_attention_mask": draw.mask[..., None]
    },
    "instructblip": _with_pictures_in_place,
    "instructblipvideo": _with_pictures_in_place,
    "kosmos-2": _kosmos,
    "kyutai_speech_to_text": _codes,
    **dict.fromkeys(("musicgen", "musicgen_decoder", "musicgen_melody", "musicgen_melody_decoder"), _codebooks),
    "pix2struct": _patches,
    "speecht5": lambda config, batch, draw: {**batch, "decoder_input_ids": draw.words % config.vocab_size},
    "udop": _boxes,
    "voxtral_realtime": lambda config, batch, draw: {
        **batch, "input_features": draw.noise(config.audio_config.num_mel_bins, draw.words.shape[1] * 8)
    },
    "whisper": _whole_window,
}  # fmt: skip
"""Model types that want something besides, or in another form."""
