"""Tiny pictures and a tiny decoder, made here from nothing, to see that every step runs without a download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mind_pictures import PACKAGES, STORED_PX
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = ("cat", "dog", "key", "bell", "ship", "star", "lemon", "rocket")
TURNS = ("<|im_start|>", "<|im_end|>")
WORDS = ("user", "assistant", "Picture", "What", "is", "it", "The", "picture", "shows", "a", ".", ":", "?", ",", "capital", "of")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def draw_pictures(seed: int = 0) -> dict[str, np.ndarray]:
    """Artist -> a coloured disc or square for each name."""
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (len(NAMES), 3))
    down, across = np.mgrid[:STORED_PX, :STORED_PX] - STORED_PX // 2
    disc = (down**2 + across**2 < (STORED_PX // 2) ** 2) * 255
    pictures = {}
    for number, artist in enumerate(PACKAGES):
        paint = np.full((len(NAMES), STORED_PX, STORED_PX, 4), 255, dtype=np.uint8)
        paint[..., :3] = np.clip(colours + 10 * number, 0, 255)[:, None, None]
        paint[::2, ..., 3] = disc
        pictures[artist] = paint
    return pictures


def write_decoder(folder: Path, seed: int = 0, words: Sequence[str] = (*WORDS, *NAMES)) -> Path:
    """A Llama of three layers that never learnt anything, and a tokenizer that knows these words, the prompt's among them."""
    known = [*TURNS, "<unk>", "\n", *words, *(f" {word}" for word in words)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(turn, special=True) for turn in TURNS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURNS[1], pad_token=TURNS[1], unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(known), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
