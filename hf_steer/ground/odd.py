"""Decoders whose attention cannot be steered for a reason that their structure does not tell: one row each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_SOUND_CODES = (
    "what its decoder reads are codes of sound, several in one position, and no prompt of words; its words are read by an encoder"
)
_DRAFTS = "it drafts for a larger model, whose keys it reads and which calls it, and reads no prompt itself. Steer that model"
_PATCHES = "Steer a model that keeps one key for each token"

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "blip_text_model": (
            "BLIP's forward takes no cache, and its generate runs its text decoder in a loop of its own. Steer BLIP-2 instead"
        ),
        "blt": (
            "it reads bytes and attends to patches of them, whose bounds the text decides, so a key stands for several bytes. "
            f"{_PATCHES}"
        ),
        "cpmant": (
            "it puts a learned prompt of its own before each prompt and is called with all tokens anew in every step, so which key "
            "stands for which token is not what its cache tells"
        ),
        "deepseek_v4": f"its layers attend to keys that each stand for a stretch of tokens, beside some of single ones. {_PATCHES}",
        "dia_decoder": _SOUND_CODES,
        "fsmt": (
            "its decoder is told its masks by the model around it alone, and adds none in the steps of generate. Steer another "
            "translation model, such as Marian or M2M100"
        ),
        "gemma4_assistant": _DRAFTS,
        "gemma4_unified_assistant": _DRAFTS,
        "idefics": "its forward demands a picture in every call. Steer Idefics2 or Idefics3 instead",
        "kyutai_speech_to_text": "its prompt is sound: each position holds a token and the codes of a stretch of sound together",
        "musicgen_decoder": _SOUND_CODES,
        "musicgen_melody_decoder": _SOUND_CODES,
        "openai-gpt": (
            "its forward takes no cache of keys, on which what is said of a prompt could ride: each step reads all tokens anew. "
            "Steer GPT-2 instead"
        ),
        "pi0": "it plans actions of a robot and speaks no tokens",
        "reformer": "its attention takes the prompt in chunks, sorted by hashes, so which key stands for which token changes",
        "rwkv": "what it calls attention carries what came before in a state, without keys",
        "speecht5": "its decoder gets its tokens through a layer of its own, which hides them. Steer Whisper instead",
        "t5gemma2_decoder": (
            "its layers attend to their own tokens and to what the encoder hands on at once, over keys of both. Steer T5Gemma "
            "instead, which keeps the two apart"
        ),
        "vibevoice": "what it writes is speech, which a diffusion of its own makes in generate. To listen, steer VibeVoice ASR",
        "xlm": "its attention blots out by a mask of ones and zeros that all heads share, and adds nothing to its logits",
        "xlnet": "it has no cache of keys, and its attention reads its mask by two streams. Steer GPT-2 or Llama instead",
    }
)
"""Model type of the model or its decoder -> what, why, and what works instead."""


def why_odd(*modules: Any) -> str | None:
    """Why attention cannot be steered, where that is known of the type of a model or of its decoder."""
    types = (str(getattr(module.config, "model_type", "")) for module in modules)
    return next((REASONS[own] for own in types if own in REASONS), None)
