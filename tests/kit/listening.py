"""Tiny models that hear, with the feature extractors of their processors, and what each of their tokens hears of a sound.

Nothing here knows where a token lies: stretches of a sound are made anew, and the features that change are looked at. The layers
of the encoders do nothing, so that what they mix does not hide where a token looks; convolutions, pools and projectors work.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from kit import tiny
from torch import Tensor
from transformers import WhisperFeatureExtractor

AUDIO, IMAGE, VIDEO, START, END, RATE, MELS = 90, 91, 92, 5, 6, 16000, 16
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
Sounds = list[np.ndarray]


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
    heard: Callable[[Any, dict[str, Any]], Tensor] = field(default=lambda model, named: _features(model, named))


def _encoded(model: Any, named: dict[str, Any]) -> Any:
    own = model if hasattr(model, "get_audio_features") else model.model
    return own.get_audio_features(**named)


def _features(model: Any, named: dict[str, Any]) -> Tensor:
    return _encoded(model, named).pooler_output


def _whisper(chunk_seconds: int = 1, **options: Any) -> Callable[[Sounds], dict[str, Any]]:
    mask = options.pop("mask")

    def extract(sounds: Sounds) -> dict[str, Any]:
        extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=chunk_seconds)
        made = extractor(sounds, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt", **options)
        return {"input_features": made["input_features"], mask: made["attention_mask"]}

    return extract


def _own(name: str, *, options: dict[str, Any] | None = None, **settings: Any) -> Callable[[Sounds], dict[str, Any]]:
    """The feature extractor of that name."""

    def extract(sounds: Sounds) -> dict[str, Any]:
        extractor = getattr(transformers, name)(**settings)
        return dict(extractor(list(sounds), sampling_rate=extractor.sampling_rate, return_tensors="pt", **(options or {})))

    return extract


def _renamed(extract: Callable[[Sounds], dict[str, Any]], **names: str) -> Callable[[Sounds], dict[str, Any]]:
    return lambda sounds: {names.get(name, name): value for name, value in extract(sounds).items()}


def _text(kind: str, **own: Any) -> dict[str, Any]:
    return {**_TEXT, "model_type": kind, **own}


LISTENERS: dict[str, Listener] = {
    "glmasr": Listener(
        "GlmAsrForConditionalGeneration", "GlmAsrConfig",
        {"audio_config": {**_LAYERED, "max_position_embeddings": 200}, "text_config": _text("llama"), "audio_token_id": AUDIO},
        _whisper(2, mask="input_features_mask"),
    ),
    "musicflamingo": Listener(
        "MusicFlamingoForConditionalGeneration", "MusicFlamingoConfig",
        {
            "audio_config": {**_LAYERED, "max_source_positions": 100, "model_type": "audioflamingo3_encoder"},
            "text_config": _text("qwen2"), "audio_token_id": AUDIO, "audio_bos_token_id": 93, "audio_eos_token_id": 94,
        },
        _whisper(2, mask="input_features_mask"),
        heard=lambda model, named: _music(model, named),
    ),
    "qwen2_5_omni_thinker": Listener(
        "Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniThinkerConfig",
        {
            "audio_config": {**_WHISPER, "n_window": 20, "output_dim": 32},
            "text_config": {**_TEXT, "rope_parameters": _MROPE},
            "vision_config": {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2},
            "audio_token_index": AUDIO, "image_token_index": IMAGE, "video_token_index": VIDEO, **_MARKS,
        },
        _whisper(3, mask="feature_attention_mask", padding="max_length", truncation=False),
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
        _whisper(3, mask="feature_attention_mask", padding="max_length", truncation=False),
        seconds=(2.431, 1.1),
    ),
    "qwen3_asr": Listener(
        "Qwen3ASRForConditionalGeneration", "Qwen3ASRConfig",
        {
            "audio_config": {**_WHISPER, "output_dim": 32, "downsample_hidden_size": 4}, "text_config": _text("qwen3"),
            "audio_token_id": AUDIO, "timestamp_token_id": 95, "pad_token_id": 0, "eos_token_id": 1,
        },
        _renamed(
            _own("Qwen3ASRFeatureExtractor", feature_size=MELS, chunk_length=3, options={"return_attention_mask": True}),
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
        lambda sounds: _granite(sounds),
        heard=lambda model, named: model.get_audio_features(named["input_features"]).pooler_output[named["input_features_mask"]],
    ),
    "gemma3n": Listener(
        "Gemma3nAudioEncoder", "Gemma3nAudioConfig",  # the whole model needs timm
        {
            "input_feat_size": 32, "hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": (8, 4), "vocab_size": 4, "vocab_offset": 92,
        },
        _own("Gemma3nAudioFeatureExtractor", feature_size=32),
        seconds=(1.43, 0.871),
        whole=lambda: transformers.Gemma3nConfig(audio_soft_tokens_per_image=12),
        heard=lambda model, named: _gemma3n(model, named),
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
        _own("Gemma4AudioFeatureExtractor"),
        heard=lambda model, named: _masked(_encoded(model, named)),
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
        _own("Gemma4UnifiedAudioFeatureExtractor"),
        heard=lambda model, named: _features(model, named)[named["input_features_mask"]],
    ),
    "moss_transcribe_diarize": Listener(
        "MossTranscribeDiarizeForConditionalGeneration", "MossTranscribeDiarizeConfig",
        {
            "audio_config": {**_LAYERED, "max_source_positions": 100}, "text_config": _text("qwen3"), "audio_token_id": AUDIO,
            "audio_chunk_size": 32000,
        },
        _own("MossTranscribeDiarizeFeatureExtractor", feature_size=MELS, chunk_length=2, options={"return_attention_mask": True}),
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
        lambda sounds: _fun_asr(sounds),
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
        _own("Phi4MultimodalFeatureExtractor"),
        heard=lambda model, named: _phi4(model, named),
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
        _own("VibeVoiceAcousticTokenizerFeatureExtractor", options={"pad_to_multiple_of": 3200}),
        rate=24000,
        heard=lambda model, named: model.get_audio_features(**named, sample=False).pooler_output,
    ),
    "qwen2_audio": Listener(
        "Qwen2AudioForConditionalGeneration", "Qwen2AudioConfig",
        {
            "audio_config": {**_WHISPER, "model_type": "qwen2_audio_encoder", "max_source_positions": 100},
            "text_config": _text("qwen2"), "audio_token_index": AUDIO,
        },
        _whisper(2, mask="feature_attention_mask"),
        heard=lambda model, named: _qwen2_audio(model, named),
    ),
    "audioflamingo3": Listener(
        "AudioFlamingo3ForConditionalGeneration", "AudioFlamingo3Config",
        {
            "audio_config": {**_LAYERED, "max_source_positions": 100, "model_type": "audioflamingo3_encoder"},
            "text_config": _text("qwen2"), "audio_token_id": AUDIO,
        },
        _whisper(2, mask="input_features_mask"),
    ),
    "voxtral": Listener(
        "VoxtralForConditionalGeneration", "VoxtralConfig",
        {
            "audio_config": {**_LAYERED, "max_source_positions": 100, "model_type": "voxtral_encoder"},
            "text_config": _text("llama"), "audio_token_id": AUDIO,
        },
        lambda sounds: {"input_features": _whisper(2, mask="mask")(sounds)["input_features"]},
    ),
    "muse_spark": Listener(
        "MuseSparkAudioModel", "MuseSparkAudioConfig",
        {"hidden_sizes": (4, 8, 8, 16), "depths": (1, 1, 1, 1), "out_hidden_size": 32},
        _own("MuseSparkFeatureExtractor", options={"return_attention_mask": True}),
        rate=24000,
        muted="mlp",
        whole=lambda: transformers.MuseSparkConfig(),
        heard=lambda model, named: _muse(model, named),
    ),
    "dots3_note": Listener(
        "Dots3NoteAudioModel", "Dots3NoteAudioConfig",
        {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "feature_size": MELS,
            "downsample_hidden_size": 4, "adapter_input_size": 16, "adapter_out_dim": 32,
        },
        _own("Dots3NoteFeatureExtractor", feature_size=MELS, chunk_length=2),
        whole=lambda: transformers.Dots3NoteConfig(),
        heard=lambda model, named: model(named["input_features"], named["chunk_sample_lengths"]).pooler_output,
    ),
    "nemotron_h_omni": Listener(
        "ParakeetEncoder", "ParakeetEncoderConfig",
        {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "num_mel_bins": MELS,
            "subsampling_conv_channels": 4,
        },
        _renamed(_own("ParakeetFeatureExtractor", feature_size=MELS), attention_mask="input_features_mask"),
        whole=lambda: SimpleNamespace(),
        heard=lambda model, named: _parakeet(model, named),
    ),
    "inkling": Listener(
        "InklingAudioModel", "InklingAudioConfig", {"n_mel_bins": 80, "mel_vocab_size": 16, "text_hidden_size": 32},
        lambda sounds: _inkling(sounds),
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
        lambda sounds: {"input_features": _whisper(2, mask="mask")(sounds)["input_features"]},
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


def _qwen2_audio(model: Any, named: dict[str, Any]) -> Tensor:
    own = model if hasattr(model, "multi_modal_projector") else model.model
    projected = own.multi_modal_projector(own.audio_tower(named["input_features"]).last_hidden_state)
    counts = own.audio_tower._get_feat_extract_output_lengths(named["feature_attention_mask"].sum(-1))[1]
    return _first(projected, counts)


def _muse(ear: Any, named: dict[str, Any]) -> Tensor:
    return _first(ear(named["input_values"]).last_hidden_state, -(-named["input_values_mask"].sum(-1) // 1920))


def _parakeet(ear: Any, named: dict[str, Any]) -> Tensor:
    mask = named["input_features_mask"]
    rows = ear(named["input_features"], attention_mask=mask).last_hidden_state
    return _first(rows, ear._get_subsampling_output_length(mask.sum(-1) + 1))


def _first(rows: Tensor, counts: Tensor) -> Tensor:
    return torch.cat([row[:count] for row, count in zip(rows, counts.tolist(), strict=True)])


def _inkling(sounds: Sounds) -> dict[str, Any]:
    """The bins of mel frames, which the processor makes."""
    made = _own("InklingFeatureExtractor")(sounds)
    bins = ((made["input_features"].clamp(-4, 2) + 4) / 6 * 15.99).int()
    return {"audio_input_ids": bins, "audio_input_ids_mask": made["input_features_mask"]}


def _music(model: Any, named: dict[str, Any]) -> Tensor:
    counts = (((named["input_features_mask"].sum(-1) - 1) // 2 + 1 - 2) // 2 + 1).tolist()
    longest = max(counts)
    ids = torch.tensor([[AUDIO] * count + [1] * (longest - count) for count in counts])
    return model.get_audio_features(**named, input_ids=ids).pooler_output


def _masked(output: Any) -> Tensor:
    mask = next(getattr(output, name) for name in ("audio_mel_mask", "attention_mask") if hasattr(output, name))
    return output.pooler_output[mask.bool()]


def _gemma3n(ear: Any, named: dict[str, Any]) -> Tensor:
    output = ear(named["input_features"], ~named["input_features_mask"])
    return output.last_hidden_state[~output.audio_mel_mask]


def _fun_asr(sounds: Sounds) -> dict[str, Any]:
    """Its extractor's stacking of frames; the frames, which torchaudio makes there, are written out."""
    from transformers.models.fun_asr_nano.feature_extraction_fun_asr_nano import FunAsrNanoFeatureExtractor as Extractor

    extractor = object.__new__(Extractor)
    extractor.num_frames_lfr, extractor.stride_lfr = 7, 6
    bank = torch.rand(201, 80, generator=torch.Generator().manual_seed(0))
    rows = []
    for sound in sounds:
        frames = torch.from_numpy(sound).unfold(0, 400, 160) * torch.hamming_window(400)
        rows.append(extractor._apply_lfr((torch.fft.rfft(frames).abs() @ bank).log()))
    longest = max(map(len, rows))
    return {
        "input_features": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "input_features_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


def _phi4(model: Any, named: dict[str, Any]) -> Tensor:
    ear = model.model.embed_tokens_extend.audio_embed
    hidden = ear.encoder(named["audio_input_features"], named.get("audio_attention_mask"))
    projected = ear.down_proj_for_speech(torch.nn.functional.gelu(ear.up_proj_for_speech(hidden)))
    return torch.cat([own[:count] for own, count in zip(projected, named["audio_embed_sizes"].tolist(), strict=True)])


def _granite(sounds: Sounds) -> dict[str, Any]:
    """Its extractor without torchaudio, whose spectrogram is written out."""
    from transformers.models.granite_speech import feature_extraction_granite_speech as module

    def mel(waves: Tensor) -> Tensor:
        power = torch.stft(waves, 512, 160, 400, torch.hann_window(400), center=True, return_complex=True).abs() ** 2
        bank = torch.rand(MELS, 257, generator=torch.Generator().manual_seed(0))
        return bank @ power

    extractor = object.__new__(module.GraniteSpeechFeatureExtractor)
    extractor.melspec_kwargs = {"hop_length": 160}
    extractor.mel_filters = mel
    extractor.projector_window_size, extractor.projector_downsample_rate = 15, 5
    kept, module.requires_backends = module.requires_backends, lambda *args: None
    try:
        return dict(extractor([torch.from_numpy(sound) for sound in sounds], device=None))
    finally:
        module.requires_backends = kept


def _listener(family: str) -> Listener:
    return LISTENERS[family] if family in LISTENERS else ENCODERS[family]


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
