"""Tiny encoder-decoders that read their encoder by cross-attention, and an oracle that adds a bias to it from outside."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
import transformers
from transformers.modeling_utils import AttentionInterface

_SIZES = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
_PAIR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SOURCE = 14
"""Words that the encoders of text read."""
LISTENING = ("whisper", "moonshine", "speech_to_text")
CROSSING = ("bart", "t5", "mllama", *LISTENING)


def _config(family):
    if family == "bart":
        return transformers.BartConfig(**_SIZES, **_PAIR, max_position_embeddings=64, forced_eos_token_id=None)
    if family == "t5":
        return transformers.T5Config(**_SIZES, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                     dropout_rate=0.0)  # fmt: skip
    if family == "whisper":
        return transformers.WhisperConfig(**_SIZES, **_PAIR, num_mel_bins=8, max_source_positions=50, max_target_positions=40)
    if family == "speech_to_text":
        return transformers.Speech2TextConfig(**_SIZES, **_PAIR, input_feat_per_channel=8, conv_channels=16,
                                              max_source_positions=64, max_target_positions=40)  # fmt: skip
    if family == "moonshine":
        return transformers.MoonshineConfig(**_SIZES, hidden_size=32, intermediate_size=48, encoder_num_hidden_layers=2,
                                            decoder_num_hidden_layers=3, encoder_num_attention_heads=4,
                                            decoder_num_attention_heads=4, encoder_num_key_value_heads=4,
                                            decoder_num_key_value_heads=4)  # fmt: skip
    text = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "cross_attention_layers": [1, 3], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": _ROPE}  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "intermediate_size": 24,
              "image_size": 16, "patch_size": 8, "vision_output_dim": 32, "max_num_tiles": 2,
              "supported_aspect_ratios": [[1, 1], [1, 2]], "intermediate_layers_indices": [0]}  # fmt: skip
    return transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=90)


_CLASSES = {
    "bart": "BartForConditionalGeneration", "t5": "T5ForConditionalGeneration", "whisper": "WhisperForConditionalGeneration",
    "speech_to_text": "Speech2TextForConditionalGeneration", "moonshine": "MoonshineForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
}  # fmt: skip


def make_crossing_model(family, implementation="sdpa"):
    config = _config(family)
    implementation = "eager" if family == "speech_to_text" else implementation  # it has no other
    torch.manual_seed(0)
    model = getattr(transformers, _CLASSES[family])._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5 * 1.5)
            elif parameter.numel() == 1:  # Mllama's gates are closed at first
                parameter.fill_(0.7)
    return model


def make_crossing_inputs(family, rows=2, tokens=5):
    generator = torch.Generator().manual_seed(1)
    own = torch.randint(5, 89, (rows, tokens), generator=generator)
    if family == "mllama":
        own[:, 1] = 90
        pixels = torch.randn(rows, 1, 2, 3, 16, 16, generator=generator)
        return {
            "input_ids": own, "attention_mask": torch.ones_like(own), "pixel_values": pixels,
            "aspect_ratio_ids": torch.full((rows, 1), 2), "aspect_ratio_mask": torch.ones(rows, 1, 2, dtype=torch.long),
            "cross_attention_mask": torch.ones(rows, tokens, 1, 2, dtype=torch.long),
        }  # fmt: skip
    heard = {
        "whisper": ("input_features", (rows, 8, 100)), "moonshine": ("input_values", (rows, 6000)),
        "speech_to_text": ("input_features", (rows, 56, 8)),
    }  # fmt: skip
    if family in heard:
        name, shape = heard[family]
        return {name: torch.randn(shape, generator=generator), "decoder_input_ids": own}
    words = torch.randint(5, 89, (rows, SOURCE), generator=generator)
    mask = torch.ones_like(words)
    mask[1, -3:] = 0
    return {"input_ids": words, "attention_mask": mask, "decoder_input_ids": own}


def positions_of(model, inputs):
    """How many positions the encoder hands on, seen at the keys of the unpatched model's cross-attention."""
    with biased(model, None) as (twin, keys), torch.no_grad():
        twin(**inputs)
    return max(keys)


@contextmanager
def biased(model, bias, *, modules=None):
    """A copy of an unpatched model in eager attention, to whose logits `bias` is added where its keys are not its queries' own.

    Args:
        bias: `(rows, heads, positions)`; None to look on alone.
        modules: ends of names of those that read the encoder.
    """
    twin, seen, original = copy.deepcopy(model), set(), AttentionInterface.get_interface
    twin.set_attn_implementation("eager")
    names = {module: name for name, module in twin.named_modules()}
    ends = modules or ("encoder_attn", "EncDecAttention", "cross_attn")

    def get_interface(interface, implementation, default):
        function = original(interface, implementation, default)

        def attend(module, query, key, value, attention_mask=None, **options):
            if names.get(module, "").endswith(ends):
                seen.add(key.shape[2])
                if bias is not None:
                    added = bias.repeat_interleave(query.shape[0] // len(bias), 0)[:, :, None].expand(-1, -1, query.shape[2], -1)
                    attention_mask = added if attention_mask is None else attention_mask + added
            return function(module, query, key, value, attention_mask, **options)

        return attend

    AttentionInterface.get_interface = get_interface
    try:
        yield twin, seen
    finally:
        AttentionInterface.get_interface = original
