"""Tones for words, a tiny ear and a tiny decoder, made here from nothing, to see that every step runs without a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mind_standins import write_decoder
from recordings import RATE_HZ, write_recordings
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

WORDS = ("cat", "dog", "key", "bell", "ship", "star", "lemon", "rocket")
PROMPT = ("Sound", "Text", ":")
WINDOW_SECONDS, WORD_SECONDS = 4, 0.2


def write_sounds(folder: Path, count: int, seed: int) -> Path:
    """Recordings of one to five words, each of which is a tone of its own."""
    random, found = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    at = np.arange(round(WORD_SECONDS * RATE_HZ)) / RATE_HZ
    for number in range(count):
        said = random.integers(len(WORDS), size=1 + number % 5)
        samples = np.concatenate([0.3 * np.sin(2 * np.pi * (300 + 150 * word) * at) for word in said])
        found.append((f"sound-{number}", samples, " ".join(WORDS[word] for word in said)))
    write_recordings(folder, found)
    return folder


def write_ear(folder: Path, seed: int = 0) -> Path:
    """A Whisper of one layer that never learnt anything."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=16, num_mel_bins=16, max_source_positions=50 * WINDOW_SECONDS, max_target_positions=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=WINDOW_SECONDS).save_pretrained(folder)
    return folder


def write_standins(folder: Path) -> dict[str, Path]:
    """Folders by what they stand in for."""
    return {
        "ear": write_ear(folder / "ear"), "mind": write_decoder(folder / "mind", words=(*PROMPT, *WORDS)),
        "phrases": write_sounds(folder / "phrases", 60, seed=0), "readers": write_sounds(folder / "readers", 10, seed=1),
    }  # fmt: skip
