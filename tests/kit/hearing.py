"""What tiny models that hear are called with, as their processors make it of sounds, and what their ears make of that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import WhisperFeatureExtractor

AUDIO, IMAGE, VIDEO, START, END, RATE, MELS = 90, 91, 92, 5, 6, 16000, 16
Sounds = list[np.ndarray]


def encoded(model: Any, named: dict[str, Any]) -> Any:
    own = model if hasattr(model, "get_audio_features") else model.model
    return own.get_audio_features(**named)


def features(model: Any, named: dict[str, Any]) -> Tensor:
    output = encoded(model, named)
    return output.last_hidden_state if output.pooler_output is None else output.pooler_output  # Qwen-Omni before 5.24


def whisper(chunk_seconds: int = 1, **options: Any) -> Callable[[Sounds], dict[str, Any]]:
    mask = options.pop("mask")

    def extract(sounds: Sounds) -> dict[str, Any]:
        extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=chunk_seconds)
        made = extractor(sounds, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt", **options)
        return {"input_features": made["input_features"], mask: made["attention_mask"]}

    return extract


def extractor(name: str, *, options: dict[str, Any] | None = None, **settings: Any) -> Callable[[Sounds], dict[str, Any]]:
    """The feature extractor of that name."""

    def extract(sounds: Sounds) -> dict[str, Any]:
        made = getattr(transformers, name)(**settings)
        return dict(made(list(sounds), sampling_rate=made.sampling_rate, return_tensors="pt", **(options or {})))

    return extract


def renamed(extract: Callable[[Sounds], dict[str, Any]], **names: str) -> Callable[[Sounds], dict[str, Any]]:
    return lambda sounds: {names.get(name, name): value for name, value in extract(sounds).items()}


def vibevoice(model: Any, named: dict[str, Any]) -> Tensor:
    """Without the noise that it adds, or with the same one every time where that cannot be left out."""
    torch.manual_seed(0)
    own = model if hasattr(model, "get_audio_features") else model.model
    quiet = {"sample": False} if "sample" in inspect.signature(own.get_audio_features).parameters else {}
    return own.get_audio_features(**named, **quiet).pooler_output


def qwen2_audio(model: Any, named: dict[str, Any]) -> Tensor:
    own = model if hasattr(model, "multi_modal_projector") else model.model
    projected = own.multi_modal_projector(own.audio_tower(named["input_features"]).last_hidden_state)
    counts = own.audio_tower._get_feat_extract_output_lengths(named["feature_attention_mask"].sum(-1))[1]
    return first(projected, counts)


def muse(ear: Any, named: dict[str, Any]) -> Tensor:
    return first(ear(named["input_values"]).last_hidden_state, -(-named["input_values_mask"].sum(-1) // 1920))


def parakeet(ear: Any, named: dict[str, Any]) -> Tensor:
    mask = named["input_features_mask"]
    rows = ear(named["input_features"], attention_mask=mask).last_hidden_state
    return first(rows, ear._get_subsampling_output_length(mask.sum(-1) + 1))


def first(rows: Tensor, counts: Tensor) -> Tensor:
    return torch.cat([row[:count] for row, count in zip(rows, counts.tolist(), strict=True)])


def inkling(sounds: Sounds) -> dict[str, Any]:
    """The bins of mel frames, which the processor makes."""
    made = extractor("InklingFeatureExtractor")(sounds)
    bins = ((made["input_features"].clamp(-4, 2) + 4) / 6 * 15.99).int()
    return {"audio_input_ids": bins, "audio_input_ids_mask": made["input_features_mask"]}


def music(model: Any, named: dict[str, Any]) -> Tensor:
    counts = (((named["input_features_mask"].sum(-1) - 1) // 2 + 1 - 2) // 2 + 1).tolist()
    longest = max(counts)
    ids = torch.tensor([[AUDIO] * count + [1] * (longest - count) for count in counts])
    return model.get_audio_features(**named, input_ids=ids).pooler_output


def masked(output: Any) -> Tensor:
    mask = next(getattr(output, name) for name in ("audio_mel_mask", "attention_mask") if hasattr(output, name))
    return output.pooler_output[mask.bool()]


def gemma3n(ear: Any, named: dict[str, Any]) -> Tensor:
    output = ear(named["input_features"], ~named["input_features_mask"])
    return output.last_hidden_state[~output.audio_mel_mask]


def fun_asr(sounds: Sounds) -> dict[str, Any]:
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


def phi4(model: Any, named: dict[str, Any]) -> Tensor:
    ear = model.model.embed_tokens_extend.audio_embed
    hidden = ear.encoder(named["audio_input_features"], named.get("audio_attention_mask"))
    projected = ear.down_proj_for_speech(torch.nn.functional.gelu(ear.up_proj_for_speech(hidden)))
    return torch.cat([own[:count] for own, count in zip(projected, named["audio_embed_sizes"].tolist(), strict=True)])


def granite(sounds: Sounds) -> dict[str, Any]:
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
