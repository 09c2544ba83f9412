"""A tiny Whisper as CTranslate2 would publish it: arrays under its names, and the JSON files beside them."""

from __future__ import annotations

import json

import numpy as np
import torch
from kit.real import model_bin, real
from transformers import WhisperConfig, WhisperForConditionalGeneration

WORDS = ["a", "b", "Ġ", "Ġa"]
LANGUAGES = ["<|en|>", "<|de|>"]
REST = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", *LANGUAGES, *REST]
TIMESTAMPS = 1501


def tiny_whisper():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(WORDS) + len(SPECIAL) + TIMESTAMPS, d_model=16, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=20, num_mel_bins=8,
        max_source_positions=1500,
        max_target_positions=64, pad_token_id=4, bos_token_id=4, eos_token_id=4, decoder_start_token_id=5,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # biases and norms are zeros and ones at first
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def as_ctranslate2(model):
    """Its arrays under CTranslate2's names: the other way round than the conversion, and written on its own."""
    state = {name: value.numpy() for name, value in model.model.state_dict().items()}

    def linear(name):
        return {"weight": state[f"{name}.weight"], "bias": state.get(f"{name}.bias", np.zeros(16, np.float32))}

    found = {}

    def put(scope, *names):
        for kind in ("weight", "bias"):
            found[f"{scope}/{kind}"] = np.concatenate([linear(name)[kind] for name in names])

    def norm(scope, name):
        found.update({f"{scope}/layer_norm/gamma": state[f"{name}.weight"], f"{scope}/layer_norm/beta": state[f"{name}.bias"]})

    for side, count, heads in (("encoder", 2, 2), ("decoder", 1, 4)):
        found[f"{side}/num_heads"] = np.int16(heads)
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(side, f"{side}.layer_norm")
        for layer in range(count):
            theirs, ours = f"{side}/layer_{layer}", f"{side}.layers.{layer}"
            put(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{part}_proj" for part in "qkv"))
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/self_attention", f"{ours}.self_attn_layer_norm")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn", f"{ours}.final_layer_norm")
            if side == "decoder":
                put(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                put(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{part}_proj" for part in "kv"))
                put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                norm(f"{theirs}/attention", f"{ours}.encoder_attn_layer_norm")
    for name in ("conv1", "conv2"):
        put(f"encoder/{name}", f"encoder.{name}")
    found["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    return found


def write_published(folder):
    """The files that lie beside `model.bin`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": place, "content": name, "special": True, **flags} for place, name in enumerate(SPECIAL, len(WORDS))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {word: place for place, word in enumerate(WORDS)}, "merges": [["Ġ", "a"]]}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "model": model,
                 "pre_tokenizer": level, "post_processor": None, "decoder": level}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    published = {"suppress_ids": [1], "suppress_ids_begin": [2, 4], "alignment_heads": [[0, 1]], "lang_ids": [6, 7]}
    (folder / "config.json").write_text(json.dumps(published))


def write_whisper(folder):
    """A folder that transformers loads, made as the real ones are."""
    published = folder.with_name(f"{folder.name} published")
    for place in (folder, published):
        place.mkdir()
    write_published(published)
    model = real("ctranslate2").read_model(model_bin(as_ctranslate2(tiny_whisper())))
    real("whisper_weights").save_whisper(model, published, folder)
