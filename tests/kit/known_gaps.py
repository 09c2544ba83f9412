"""Architectures that hf_steer does not steer, or of which something fails, and why: what `testing/test_coverage_*.py` expects.

An architecture that is not named here must be covered; one that is must show its reason, so a row that is out of date fails, too.
"""

from __future__ import annotations

import importlib.util

from kit.versions import RELEASE

UNHEARD = ("ctc", "rnnt", "tdt")
"""Kinds of models that write what they hear without a language model that reads a prompt."""
NO_PROMPT = "takes no token numbers, so no language model reads a prompt here"
STATE = "has no attention to steer: its layers carry what came before in a state of another kind"
CODES = "what its decoder reads are codes of sound"
KEYS_OF_OTHERS = "shared_kv_states cannot be None"  # they draft with the keys of another model

GAPS: dict[str, str] = {
    # no attention to a prompt
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "xlstm"), STATE),
    "rwkv": "what it calls attention carries what came before in a state, without keys",
    "diffusion_gemma": NO_PROMPT,
    "speecht5": "its decoder gets its tokens through a layer of its own",
    # attention in which no single key stands for a token, or with another prompt than words
    **dict.fromkeys(("dia", "musicgen", "musicgen_melody"), CODES),
    "kyutai_speech_to_text": "its prompt is sound",
    "blt": "it reads bytes and attends to patches of them",
    "deepseek_v4": "its layers attend to keys that each stand for a stretch of tokens",
    "reformer": "its attention takes the prompt in chunks, sorted by hashes",
    "t5gemma2": "its layers attend to their own tokens and to what the encoder hands on at once",
    "cpmant": "it puts a learned prompt of its own before each prompt",
    # attention or passes of another form
    "blip": "BLIP's forward takes no cache",
    "fsmt": "its decoder is told its masks by the model around it alone",
    "idefics": "its forward demands a picture in every call",
    "openai-gpt": "its forward takes no cache of keys",
    "vibevoice": "what it writes is speech",
    "xlm": "its attention blots out by a mask of ones and zeros",
    "xlnet": "it has no cache of keys",
    # its `generate` keeps no cache
    "pix2struct": "Leave use_cache at True",
    # those that do not run by themselves, and are no language models
    "gemma4_assistant": KEYS_OF_OTHERS,
    "gemma4_unified_assistant": KEYS_OF_OTHERS,
    "pi0": "missing 1 required positional argument: 'state'",  # moves a robot
    # faults of transformers' own
    **({"llama4-Llama4ForConditionalGeneration": "has no attribute 'image_outputs'"} if RELEASE == (5, 24) else {}),
}  # fmt: skip
"""Model type, or `type-Class` -> part of the reason that `cover` gives."""
MASK_BEFORE_SCALE = "its code scales its logits once its mask is added"
NO_MASK = "a pass calls no module with a mask over its tokens"  # BERT's kin, before it called attention functions
OLDER: dict[tuple[int, int], dict[str, str]] = {
    (5, 14): {
        "codegen": MASK_BEFORE_SCALE,
        "diffusion_gemma": "does not build",
        "inkling_mm_model": "a prompt of a likeness raises",
        "inkling_text": "a prompt of a likeness raises",
        "nemotron_h": "KeyError: 'mlp'",
        "olmo_hybrid": "has no attribute 'get_query_offset'",
        **dict.fromkeys(("big_bird", "megatron-bert", "rembert", "roformer"), NO_MASK),
        **dict.fromkeys(("longt5", "mt5", "pix2struct", "pop2piano", "t5", "udop"), "its code adds no mask to its logits"),
        "git": "a step of a likeness raises",
        "switch_transformers": "a prompt of a likeness raises",
    },
    (5, 18): {
        "codegen": MASK_BEFORE_SCALE,
        "cohere_compass": "does not build",
        "cohere_compass_text": "does not build",
        "diffusion_gemma": "does not build",
    },
    (5, 23): {
        "codegen": MASK_BEFORE_SCALE,
        "gemma4_assistant": "does not build",
        "gemma4_unified_assistant": "does not build",
    },
}
"""The same for single older releases."""
NEEDED = {"timm": ("fast_vlm", "gemma3n-Gemma3nForConditionalGeneration", "perception_lm")}
"""Optional packages of transformers -> what cannot be built without."""


def gap_of(architecture) -> str | None:
    """Part of the reason why an architecture is not covered; None for one that is."""
    names = (str(architecture), architecture.model_type)
    for package, needing in NEEDED.items():
        if set(names) & set(needing) and importlib.util.find_spec(package) is None:
            return f"requires the {package} library"
    gaps = GAPS | OLDER.get(RELEASE, {})
    return next((gaps[name] for name in names if name in gaps), "" if architecture.kind in UNHEARD else None)
