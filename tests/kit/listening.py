"""Tiny models that hear, with the feature extractors of their processors, and what each of their tokens hears of a sound.

Nothing here knows where a token lies: stretches of a sound are made anew, and the features that change are looked at. The layers
of the encoders do nothing, so that what they mix does not hide where a token looks; convolutions, pools and projectors work.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from kit import hearing, tiny
from kit.hearing import AUDIO, END, IMAGE, MELS, RATE, START, VIDEO, Sounds
from torch import Tensor

_TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_MARKS = {"audio_start_token_id": START, "audio_end_token_id": END, "vision_start_token_id": 93, "vision_end_token_id": 94}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_WHISPER = {
    "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": MELS,
}  # fmt: skip
_LAYERED = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "num_mel_bins": MELS}
_LAYERS = re.compile(r"(^|(?<!subsampling)\.)(layers|encoders|conformer)\.")
_READERS = re.compile(r"language_model|^model\.layers")
"""Layers of encoders, and of the language models that are left as they are."""


@dataclass(frozen=True)
class Listener:
    """One family.

    Attributes:
        model: name of its class.
        config: name of its configuration's class.
        sections: that it is made with.
        extract: from sounds to the arguments of the model.
        seconds: how long the sounds of a test are.
        rate: samples a second.
        muted: pattern of those of the layers' matrices that are zero, where not all are.
        whole: the configuration of the whole model, where only its ear is made here.
        heard: from the model and its arguments to `(tokens of all sounds, features)`, and tokens of each.
    """

    model: str
    config: str
    sections: dict[str, Any]
    extract: Callable[[Sounds], dict[str, Any]]
    seconds: tuple[float, ...] = (1.13, 0.871)
    rate: int = RATE
    muted: str = ""
    whole: Callable[[], Any] | None = None
    heard: Callable[[Any, dict[str, Any]], Tensor] = hearing.features


def _text(kind: str, **own: Any) -> dict[str, Any]:
    return {**_TEXT, "model_type": kind, **own}


LISTENERS: dict[str, Listener] = {
    "glmasr": Listener(
        "GlmAsrForConditionalGeneration", "GlmAsrConfig",
        {"audio_config": {**_LAYERED, "max_position_embeddings": 200}, "text_config": _text("llama"), "audio_token_id": AUDIO},
        hearing.whisper(2, mask="input_features_mask"),
    ),
    "musicflamingo": Listener(
        "MusicFlamingoForConditionalGeneration", "MusicFlamingoConfig",
        {
            "audio_config": {**_LAYERED, "max_source_positions": 100, "model_type": "audioflamingo3_encoder"},
            "text_config": _text("qwen2"), "audio_token_id": AUDIO, "audio_bos_token_id": 93, "audio_eos_token_id": 94,
        },
        hearing.whisper(2, mask="input_features_mask"),
        heard=hearing.music,
    ),
    "qwen2_5_omni_thinker": Listener(
        "Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniThinkerConfig",
        {
            "audio_config": {**_WHISPER, "n_window": 20, "output_dim": 32},
            "text_config": {**_TEXT, "rope_parameters": _MROPE},
            "vision_config": {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2},
            "audio_token_index": AUDIO, "image_token_index": IMAGE, "video_token_index": VIDEO, **_MARKS,
        },
        hearing.whisper(3, mask="feature_attention_mask", padding="max_length", truncation=False),
    ),
    "qwen3_omni_moe_thinker": Listener(
        "Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeThinkerConfig",
        {
            "audio_config": {**_WHISPER, "output_dim": 32, "downsample_hidden_size": 4},
            "text_config": {
                **_TEXT, "rope_parameters": _MROPE, "moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1,
            },
            "vision_config": {
                "depth": 1, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2,
                "deepstack_visual_indexes": [0],
            },
            "audio_token_id": AUDIO, "image_token_id": IMAGE, "video_token_id": VIDEO, **_MARKS,
        },
        hearing.whisper(3, mask="feature_attention_mask", padding="max_length", truncation=False),
        seconds=(2.431, 1.1),
    ),
    "qwen3_asr": Listener(
        "Qwen3ASRForConditionalGeneration", "Qwen3ASRConfig",
        {
            "audio_config": {**_WHISPER, "output_dim": 32, "downsample_hidden_size": 4}, "text_config": _text("qwen3"),
            "audio_token_id": AUDIO, "timestamp_token_id": 95, "pad_token_id": 0, "eos_token_id": 1,
        },
        hearing.renamed(
            hearing.extractor(
                "Qwen3ASRFeatureExtractor", feature_size=MELS, chunk_length=3, options={"return_attention_mask": True}
            ),
            attention_mask="input_features_mask",
        ),
        seconds=(2.431, 1.1),
    ),
    "granite_speech": Listener(
        "GraniteSpeechForConditionalGeneration", "GraniteSpeechConfig",
        {
            "text_config": _text("granite"),
            "encoder_config": {
                "input_dim": 2 * MELS, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "dim_head": 8, "output_dim": 6,
                "context_size": 20, "max_pos_emb": 32, "dropout": 0.0,
            },
            "projector_config": {
                "model_type": "blip_2_qformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 24, "encoder_hidden_size": 16, "cross_attention_frequency": 1,
                "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            },
            "audio_token_index": AUDIO, "has_lora_adapter": False,
        },
        hearing.granite,
        heard=lambda model, named: model.get_audio_features(named["input_features"]).pooler_output[named["input_features_mask"]],
    ),
    "gemma3n": Listener(
        "Gemma3nAudioEncoder", "Gemma3nAudioConfig",  # the whole model needs timm
        {
            "input_feat_size": 32, "hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": (8, 4), "vocab_size": 4, "vocab_offset": 92,
        },
        hearing.extractor("Gemma3nAudioFeatureExtractor", feature_size=32),
        seconds=(1.43, 0.871),
        whole=lambda: transformers.Gemma3nConfig(audio_soft_tokens_per_image=12),
        heard=hearing.gemma3n,
    ),
    "gemma4": Listener(
        "Gemma4ForConditionalGeneration", "Gemma4Config",
        {
            "audio_config": {
                "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "subsampling_conv_channels": (128, 4),
                "output_proj_dims": 16,
            },
            "text_config": {
                **_TEXT, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "eos_token_id": 1,
                "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8,
            },
            "vision_config": {
                "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
                "intermediate_size": 24,
            },
            "audio_token_id": AUDIO, "image_token_id": IMAGE, "video_token_id": VIDEO,
        },
        hearing.extractor("Gemma4AudioFeatureExtractor"),
        heard=lambda model, named: hearing.masked(hearing.encoded(model, named)),
    ),
    "gemma4_unified": Listener(
        "Gemma4UnifiedForConditionalGeneration", "Gemma4UnifiedConfig",
        {
            "audio_config": {},
            "text_config": {
                **_TEXT, "eos_token_id": 1, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8,
            },
            "vision_config": None,
            "audio_token_id": AUDIO, "image_token_id": IMAGE, "video_token_id": VIDEO,
        },
        hearing.extractor("Gemma4UnifiedAudioFeatureExtractor"),
        heard=lambda model, named: hearing.features(model, named)[named["input_features_mask"]],
    ),
    "moss_transcribe_diarize": Listener(
        "MossTranscribeDiarizeForConditionalGeneration", "MossTranscribeDiarizeConfig",
        {
            "audio_config": {**_LAYERED, "max_source_positions": 100}, "text_config": _text("qwen3"), "audio_token_id": AUDIO,
            "audio_chunk_size": 32000,
        },
        hearing.extractor(
            "MossTranscribeDiarizeFeatureExtractor", feature_size=MELS, chunk_length=2, options={"return_attention_mask": True}
        ),
    ),
    "fun_asr_nano": Listener(
        "FunAsrNanoForConditionalGeneration", "FunAsrNanoConfig",
        {
            "audio_config": {**_LAYERED, "num_mel_bins": 80, "num_timestamp_prediction_layers": 1},
            "adaptor_config": {
                "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1,
                "projector_hidden_size": 24,
            },
            "text_config": _text("qwen3"), "audio_token_id": AUDIO,
        },
        hearing.fun_asr,
        muted="o_proj|fsmn",
    ),
    "phi4_multimodal": Listener(
        "Phi4MultimodalForCausalLM", "Phi4MultimodalConfig",
        {
            **_TEXT, "audio_config": {
                "hidden_size": 16, "intermediate_size": 24, "num_blocks": 2, "num_attention_heads": 2, "ext_pw_out_channel": 16,
                "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8, "audio_token_id": AUDIO,
            },
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
                "patch_size": 14, "crop_size": 28, "image_token_id": IMAGE,
            },
        },
        hearing.extractor("Phi4MultimodalFeatureExtractor"),
        heard=hearing.phi4,
    ),
    "vibevoice_asr": Listener(
        "VibeVoiceAsrForConditionalGeneration", "VibeVoiceAsrConfig",
        {
            **{
                f"{kind}_tokenizer_encoder_config": {
                    "model_type": "vibevoice_acoustic_tokenizer_encoder", "hidden_size": 8, "num_filters": 2, "depths": [1] * 7,
                }
                for kind in ("acoustic", "semantic")
            },
            "text_config": _text("qwen2"), "audio_token_id": AUDIO, "audio_bos_token_id": 93, "audio_eos_token_id": 94,
        },
        hearing.extractor("VibeVoiceAcousticTokenizerFeatureExtractor", options={"pad_to_multiple_of": 3200}),
        rate=24000,
        heard=hearing.vibevoice,
    ),
    "qwen2_audio": Listener(
        "Qwen2AudioForConditionalGeneration", "Qwen2AudioConfig",
        {
            "audio_config": {**_WHISPER, "model_type": "qwen2_audio_encoder", "max_source_positions": 100},
            "text_config": _text("qwen2"), "audio_token_index": AUDIO,
        },
        hearing.whisper(2, mask="feature_attention_mask"),
        heard=hearing.qwen2_audio,
    ),
    "audioflamingo3": Listener(
        "AudioFlamingo3ForConditionalGeneration", "AudioFlamingo3Config",
        {
            "audio_config": {**_LAYERED, "max_source_positions": 100, "model_type": "audioflamingo3_encoder"},
            "text_config": _text("qwen2"), "audio_token_id": AUDIO,
        },
        hearing.whisper(2, mask="input_features_mask"),
    ),
    "voxtral": Listener(
        "VoxtralForConditionalGeneration", "VoxtralConfig",
        {
            "audio_config": {**_LAYERED, "max_source_positions": 100, "model_type": "voxtral_encoder"},
            "text_config": _text("llama"), "audio_token_id": AUDIO,
        },
        lambda sounds: {"input_features": hearing.whisper(2, mask="mask")(sounds)["input_features"]},
    ),
    "muse_spark": Listener(
        "MuseSparkAudioModel", "MuseSparkAudioConfig",
        {"hidden_sizes": (4, 8, 8, 16), "depths": (1, 1, 1, 1), "out_hidden_size": 32},
        hearing.extractor("MuseSparkFeatureExtractor", options={"return_attention_mask": True}),
        rate=24000,
        muted="mlp",
        whole=lambda: transformers.MuseSparkConfig(),
        heard=hearing.muse,
    ),
    "dots3_note": Listener(
        "Dots3NoteAudioModel", "Dots3NoteAudioConfig",
        {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "feature_size": MELS,
            "downsample_hidden_size": 4, "adapter_input_size": 16, "adapter_out_dim": 32,
        },
        hearing.extractor("Dots3NoteFeatureExtractor", feature_size=MELS, chunk_length=2),
        whole=lambda: transformers.Dots3NoteConfig(),
        heard=lambda model, named: model(named["input_features"], named["chunk_sample_lengths"]).pooler_output,
    ),
    "nemotron_h_omni": Listener(
        "ParakeetEncoder", "ParakeetEncoderConfig",
        {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "num_mel_bins": MELS,
            "subsampling_conv_channels": 4,
        },
        hearing.renamed(hearing.extractor("ParakeetFeatureExtractor", feature_size=MELS), attention_mask="input_features_mask"),
        whole=lambda: SimpleNamespace(),
        heard=hearing.parakeet,
    ),
    "inkling": Listener(
        "InklingAudioModel", "InklingAudioConfig", {"n_mel_bins": 80, "mel_vocab_size": 16, "text_hidden_size": 32},
        hearing.inkling,
        whole=lambda: SimpleNamespace(),
        heard=lambda model, named: model(named["audio_input_ids"][named["audio_input_ids_mask"]]).pooler_output,
    ),
}  # fmt: skip
ENCODERS: dict[str, Listener] = {
    "whisper": Listener(
        "WhisperModel", "WhisperConfig",
        {
            **_WHISPER, "max_source_positions": 100, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16,
            "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        },
        lambda sounds: {"input_features": hearing.whisper(2, mask="mask")(sounds)["input_features"]},
        heard=lambda model, named: model.get_encoder()(**named).last_hidden_state[0],
    ),
    "moonshine": Listener(
        "MoonshineModel", "MoonshineConfig",
        {
            "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 1, "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2,
            "encoder_num_key_value_heads": 2, "decoder_num_key_value_heads": 2,
        },
        lambda sounds: {"input_values": torch.from_numpy(sounds[0])[None]},
        heard=lambda model, named: model.get_encoder()(**named).last_hidden_state[0],
    ),
}  # fmt: skip
"""Encoders that decoders read by cross-attention, and the first sound's places."""
LISTENERS["granite_speech_plus"] = replace(
    LISTENERS["granite_speech"], model="GraniteSpeechPlusForConditionalGeneration", config="GraniteSpeechPlusConfig"
)


def _listener(family: str) -> Listener:
    return LISTENERS[family] if family in LISTENERS else ENCODERS[family]


def is_here(family: str) -> bool:
    """Whether the installed transformers has it, and makes its features without a further package."""
    own = _listener(family)
    if not hasattr(transformers, own.model):
        return False
    try:
        own.extract([noise(0.5, own.rate, 0)])
    except ImportError:  # Parakeet's wanted librosa
        return False
    return True


@functools.cache
def make_listener(family: str) -> Any:
    """A model whose encoder's layers change nothing."""
    own = _listener(family)
    torch.manual_seed(0)
    model = getattr(transformers, own.model)._from_config(getattr(transformers, own.config)(**own.sections))
    tiny.spread(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            encodes = _LAYERS.search(name) and not _READERS.search(name)
            if encodes and re.search(own.muted, name) and parameter.ndim > 1:
                parameter.zero_()
    return model.eval()


def noise(seconds: float, rate: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(seconds * rate)) * 0.1).astype(np.float32)


def hear(family: str, sounds: Sounds) -> Tensor:
    """`(tokens, features)` of all sounds, one after the other."""
    own = _listener(family)
    with torch.no_grad():
        heard = own.heard(make_listener(family), own.extract(list(sounds)))
    return heard.reshape(-1, heard.shape[-1]).double()


def changes(family: str, sounds: Sounds, which: int, slot_seconds: float) -> Tensor:
    """`(slots, tokens)`: how much the features of each token change when a slot of one of the sounds is made anew."""
    rate = _listener(family).rate
    plain, rows = hear(family, sounds), []
    step = round(slot_seconds * rate)
    for number, start in enumerate(range(0, len(sounds[which]), step)):
        other = list(sounds)
        other[which] = sounds[which].copy()
        slot = other[which][start : start + step]
        slot[:] = noise(len(slot) / rate, rate, 1000 + number)
        rows.append((hear(family, other) - plain).norm(dim=1))
    return torch.stack(rows)
