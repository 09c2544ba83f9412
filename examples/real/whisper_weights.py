"""Makes a plain folder of transformers' Whisper of CTranslate2's arrays: weights, configuration, tokenizer, generation."""

import json
from pathlib import Path

import numpy as np
import torch
from ctranslate2 import FormatError
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

MULTILINGUAL_WORDS = 51865
"""Vocabularies of at least so many are those of Whispers of several languages, as transformers tells them apart."""
TIMESTAMP_STEPS = 1500
"""From 0 to 30 seconds, 20 ms each."""

NORM = {"weight": "gamma", "bias": "beta"}
PLAIN = {"weight": "weight", "bias": "bias"}


def norm_and_linears(theirs, ours, norm, linears):
    """Names of a block that are the same array on both sides: its norm, and linear maps by their numbers."""
    yield from ((f"{ours}.{norm}.{kind}", f"{theirs}/layer_norm/{name}") for kind, name in NORM.items())
    for number, linear in linears.items():
        yield from ((f"{ours}.{linear}.{kind}", f"{theirs}/linear_{number}/{name}") for kind, name in PLAIN.items())


def same_arrays(layers):
    """transformers' name and CTranslate2's of every array that needs no change, for so many layers by side."""
    for side, count in layers.items():
        whole = f"model.{side}"
        yield f"{whole}.embed_positions.weight", f"{side}/position_encodings/encodings"
        yield from norm_and_linears(side, whole, "layer_norm", {})
        for number in range(count):
            theirs, ours = f"{side}/layer_{number}", f"{whole}.layers.{number}"
            yield from norm_and_linears(f"{theirs}/self_attention", ours, "self_attn_layer_norm", {1: "self_attn.out_proj"})
            yield from norm_and_linears(f"{theirs}/ffn", ours, "final_layer_norm", {0: "fc1", 1: "fc2"})
            if side == "decoder":
                linears = {0: "encoder_attn.q_proj", 2: "encoder_attn.out_proj"}
                yield from norm_and_linears(f"{theirs}/attention", ours, "encoder_attn_layer_norm", linears)
    for name in ("conv1", "conv2"):
        yield from ((f"model.encoder.{name}.{kind}", f"encoder/{name}/{kind}") for kind in PLAIN)
    yield "model.decoder.embed_tokens.weight", "decoder/embeddings/weight"


def fused_arrays(layers):
    """Queries, keys and values that are one matrix there: its name, transformers' module, and the parts from top to bottom."""
    for side, count in layers.items():
        for number in range(count):
            ours = f"model.{side}.layers.{number}"
            yield f"{side}/layer_{number}/self_attention/linear_0", f"{ours}.self_attn", "qkv"
            if side == "decoder":
                yield f"{side}/layer_{number}/attention/linear_1", f"{ours}.encoder_attn", "kv"


def count_layers(variables, side):
    blocks = {name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")}
    return len(blocks - {"layer_norm"})


def state_of(variables):
    """The state dict of `WhisperForConditionalGeneration` in float32.

    Raises:
        FormatError: arrays are missing or left over, are quantised to whole numbers, or a key has a bias, which Whisper's have not.
    """
    if quantised := sorted(name for name in variables if name.endswith("_scale") and name.count("/") > 1):
        raise FormatError(f"weights are whole numbers with scales (first: {quantised[0]}); take a float16 or float32 model")
    layers = {side: count_layers(variables, side) for side in ("encoder", "decoder")}
    pairs, fused = dict(same_arrays(layers)), list(fused_arrays(layers))
    wanted = {*pairs.values(), *(f"{name}/{kind}" for name, _, _ in fused for kind in PLAIN)}
    there = {name for name, value in variables.items() if value.ndim and not name.startswith("decoder/projection")}
    if wanted != there:
        raise FormatError(f"arrays missing: {sorted(wanted - there)[:5]}; not known: {sorted(there - wanted)[:5]}")
    state = {ours: variables[theirs] for ours, theirs in pairs.items()}
    for name, module, parts in fused:
        for kind in PLAIN:
            pieces = np.split(variables[f"{name}/{kind}"], len(parts))
            state.update({f"{module}.{part}_proj.{kind}": piece for part, piece in zip(parts, pieces, strict=True)})
        if np.any(state.pop(f"{module}.k_proj.bias")):
            raise FormatError(f"the keys of {name} have a bias; Whisper's have none")
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in state.items()}


def special_ids(folder):
    """Numbers of the tokens in angle brackets, from `tokenizer.json`."""
    return {token["content"]: token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}


def config_of(variables, ids):
    """From the arrays' shapes and the tokenizer's numbers."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    sizes = {}
    for side in ("encoder", "decoder"):
        sizes |= {
            f"{side}_layers": count_layers(variables, side), f"{side}_attention_heads": int(variables[f"{side}/num_heads"]),
            f"{side}_ffn_dim": variables[f"{side}/layer_0/ffn/linear_0/bias"].shape[0],
        }  # fmt: skip
    end = ids["<|endoftext|>"]
    return WhisperConfig(
        vocab_size=vocabulary, d_model=width, num_mel_bins=variables["encoder/conv1/weight"].shape[1], **sizes,
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=ids["<|startoftranscript|>"],
        begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip


def generation_of(config, ids, published):
    """How it generates: what is never said, the languages and tasks, where timestamps begin. Without timestamps unless asked for.

    Args:
        config: of the model.
        ids: of the special tokens.
        published: CTranslate2's `config.json`: `suppress_ids`, `suppress_ids_begin`, `alignment_heads`.
    """
    end = ids["<|endoftext|>"]
    several = config.vocab_size >= MULTILINGUAL_WORDS
    tasks = ("translate", "transcribe")
    languages = {name: number for name, number in ids.items() if ids["<|startoftranscript|>"] < number < ids["<|translate|>"]}
    whisper = {}
    if several:  # where neither is given, transformers finds the language out and leaves the task's token away
        whisper = {"lang_to_id": languages, "task_to_id": {task: ids[f"<|{task}|>"] for task in tasks}, "task": "transcribe"}
    return GenerationConfig(
        decoder_start_token_id=ids["<|startoftranscript|>"], bos_token_id=end, eos_token_id=end, pad_token_id=end,
        suppress_tokens=published["suppress_ids"], begin_suppress_tokens=published["suppress_ids_begin"],
        max_length=config.max_target_positions, return_timestamps=False, is_multilingual=several,
        no_timestamps_token_id=ids["<|notimestamps|>"], max_initial_timestamp_index=50, prev_sot_token_id=ids["<|startofprev|>"],
        alignment_heads=published["alignment_heads"], **whisper,
    )  # fmt: skip


def save_tokenizer(source, target):
    """The published `tokenizer.json` as transformers' WhisperTokenizer; timestamps that it lacks are added at their places."""
    known = json.loads((source / "tokenizer.json").read_text())
    ids = special_ids(source)
    first = ids["<|notimestamps|>"] + 1
    if "<|0.00|>" not in ids:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        known["added_tokens"] += [
            {"id": first + step, "content": f"<|{step * 0.02:.2f}|>", **flags} for step in range(TIMESTAMP_STEPS + 1)
        ]
    (target / "tokenizer.json").write_text(json.dumps(known, ensure_ascii=False))
    end = "<|endoftext|>"
    said = {"tokenizer_class": "WhisperTokenizer", "bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end,
            "model_max_length": 1024, "clean_up_tokenization_spaces": False}  # fmt: skip
    (target / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = WhisperTokenizer.from_pretrained(target, local_files_only=True)
    tokenizer.save_pretrained(target)


def save_whisper(model, source, target):
    """Writes a folder that `WhisperForConditionalGeneration` and `WhisperProcessor` load.

    Args:
        model: what `ctranslate2.read_model` found.
        source: folder with the published `config.json` and `tokenizer.json`.
        target: an empty folder.
    """
    if model.name != "WhisperSpec":
        raise FormatError(f"a {model.name}, and only WhisperSpec is known here")
    source, target = Path(source), Path(target)
    ids = special_ids(source)
    config = config_of(model.variables, ids)
    whisper = WhisperForConditionalGeneration(config)
    missing, unexpected = whisper.load_state_dict(state_of(model.variables), strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:  # it is the embedding itself
        raise FormatError(f"weights missing: {missing}; not known: {unexpected}")
    whisper.tie_weights()
    whisper.generation_config = generation_of(config, ids, json.loads((source / "config.json").read_text()))
    whisper.save_pretrained(target)
    save_tokenizer(source, target)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)
