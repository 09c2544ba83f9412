"""A tiny llama with a tokenizer in one GGUF file, as llama.cpp's converter writes them."""

from __future__ import annotations

import numpy as np

FILE = "tiny.gguf"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGED = ("th", "at", "Ġth", "Ġthat")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FEATURES, LAYERS, HEADS, KEY_VALUE_HEADS, INNER = 32, 3, 4, 2, 48


def letters():
    """How byte-level BPE writes the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + number) for number in range(len(hidden))]


def write_gguf(folder, *, seed=0, tokens=512):
    """Write `FILE` into a folder, for texts of so many tokens; returns the folder."""
    import gguf

    random = np.random.default_rng(seed)
    words = [*SPECIAL, *letters(), *MERGED]
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    size = FEATURES // HEADS
    for add, value in (
        (writer.add_context_length, tokens), (writer.add_embedding_length, FEATURES), (writer.add_block_count, LAYERS),
        (writer.add_feed_forward_length, INNER), (writer.add_head_count, HEADS), (writer.add_head_count_kv, KEY_VALUE_HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 10000.0), (writer.add_rope_dimension_count, size),
        (writer.add_vocab_size, len(words)), (writer.add_file_type, 0), (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "default"), (writer.add_token_list, words),
        (writer.add_token_types, [3] * len(SPECIAL) + [1] * (len(words) - len(SPECIAL))),
        (writer.add_token_merges, ["t h", "a t", "Ġ th", "Ġth at"]), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 2), (writer.add_chat_template, TEMPLATE),
    ):  # fmt: skip
        add(value)
    inner = KEY_VALUE_HEADS * size
    shapes = {
        "attn_q": (FEATURES, FEATURES), "attn_k": (inner, FEATURES), "attn_v": (inner, FEATURES),
        "attn_output": (FEATURES, FEATURES), "ffn_gate": (INNER, FEATURES), "ffn_up": (INNER, FEATURES),
        "ffn_down": (FEATURES, INNER), "attn_norm": (FEATURES,), "ffn_norm": (FEATURES,),
    }  # fmt: skip
    named = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in {"token_embd": (len(words), FEATURES), "output_norm": (FEATURES,), **named}.items():
        drawn = 0.2 * random.standard_normal(shape) + (len(shape) == 1)
        writer.add_tensor(f"{name}.weight", drawn.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder
