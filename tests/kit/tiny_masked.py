"""Tiny random decoders whose attention looks no attention function up, and one that adds the bias where they take their softmax."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from kit.tiny import settle_generation, spread
from kit.versions import RELEASE
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

WIDTH, HEADS, LAYERS, WORDS = 32, 4, 2, 96
_BERT = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 48,
    "max_position_embeddings": 64, "is_decoder": True,
}  # fmt: skip
_BART = {
    "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": LAYERS, "encoder_attention_heads": 2,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
_FALCON = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_kv_heads": HEADS,
    "multi_query": False,
}  # fmt: skip
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "big_bird": ("BigBirdForCausalLM", _BERT),
    "bloom": ("BloomForCausalLM", {"vocab_size": WORDS, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}),
    "falcon": ("FalconForCausalLM", {**_FALCON, "multi_query": True}),
    "falcon_alibi": ("FalconForCausalLM", {**_FALCON, "alibi": True}),
    "falcon_new": ("FalconForCausalLM", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "git": ("GitForCausalLM", {**_BERT, "vision_config": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }}),
    "gpt_neo": ("GPTNeoForCausalLM", {
        "vocab_size": WORDS, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]], "window_size": 4,
    }),
    "gpt_neox_japanese": ("GPTNeoXJapaneseForCausalLM", _BERT),
    "led": ("LEDForConditionalGeneration", {
        **_BART, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": [4],
    }),
    "megatron-bert": ("MegatronBertForCausalLM", _BERT),
    "mpt": ("MptForCausalLM", {"vocab_size": WORDS, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64}),
    "mvp": ("MvpForConditionalGeneration", _BART),
    "prophetnet": ("ProphetNetForCausalLM", {
        "vocab_size": WORDS, "hidden_size": WIDTH, "num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": HEADS,
        "max_position_embeddings": 64, "is_decoder": True, "add_cross_attention": False, "is_encoder_decoder": False,
    }),
    "rembert": ("RemBertForCausalLM", {**_BERT, "input_embedding_size": WIDTH, "output_embedding_size": WIDTH}),
    "roformer": ("RoFormerForCausalLM", _BERT),
    "trocr": ("TrOCRForCausalLM", {
        "vocab_size": WORDS, "d_model": WIDTH, "decoder_layers": LAYERS, "decoder_attention_heads": HEADS, "decoder_ffn_dim": 48,
        "max_position_embeddings": 64, "cross_attention_hidden_size": WIDTH,
    }),
    "xglm": ("XGLMForCausalLM", {
        "vocab_size": WORDS, "d_model": WIDTH, "num_layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 48,
        "max_position_embeddings": 64,
    }),
}  # fmt: skip
_LATE = () if RELEASE >= (5, 18) else ("big_bird", "git", "megatron-bert", "rembert", "roformer")
"""Before 5.18, BERT's kin let a token see those after it when they decode, and GIT did not go without a picture."""
MASKED = tuple(kind for kind in _MODELS if kind not in _LATE)
PAIRS = ("led", "mvp")
"""Encoder-decoders, whose decoder's own tokens are the prompt."""
SHIFTED = ("big_bird", "git", "led", "megatron-bert", "mvp", "prophetnet", "rembert", "roformer", "trocr", "xglm", "gpt_neo")
"""Their positions count padding, unless somebody gives them: more of it changes what they say."""


def make_masked(kind: str, implementation: str = "eager", *, seed: int = 0, **changes: Any) -> Any:
    """A model whose attention is far from uniform."""
    name, settings = _MODELS[kind]
    cls = getattr(transformers, name)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(seed)
    config = cls.config_class(**{**tokens, **settings, **changes})
    model = cls._from_config(config, attn_implementation=implementation)
    spread(model, seed)
    settle_generation(model)
    model.generation_config.suppress_tokens = None
    model.generation_config.forced_eos_token_id = None
    return model.eval()


def prompt_of(kind: str, rows: tuple[int, ...] = (10, 7), *, seed: int = 0) -> dict[str, Tensor]:
    """Rows of unequal length, padded on the left; those of the decoder where an encoder reads another prompt."""
    generator, longest = torch.Generator().manual_seed(seed), max(rows)
    ids = torch.randint(3, WORDS, (len(rows), longest), generator=generator)
    mask = torch.tensor([[0] * (longest - own) + [1] * own for own in rows])
    if kind not in PAIRS:
        return {"input_ids": ids * mask, "attention_mask": mask}
    source = torch.randint(3, WORDS, (len(rows), 16), generator=generator)
    return {"input_ids": source, "decoder_input_ids": ids * mask, "decoder_attention_mask": mask}


def words_of(inputs: dict[str, Tensor]) -> Tensor:
    """The prompt's own tokens."""
    return inputs.get("decoder_input_ids", inputs["input_ids"])


class SoftmaxOracle(TorchFunctionMode):
    """Adds `λ · s` to the logits of each softmax over so many keys, told by its shape alone; the layers come in turn.

    Args:
        strengths: λ of each head, layer by layer.
        scores: `(batch, tokens)`.
        keys: of the pass; all tokens so far.
    """

    def __init__(self, strengths: list[list[float]], scores: Tensor, keys: int) -> None:
        super().__init__()
        self.strengths, self.scores, self.keys, self.count = torch.tensor(strengths), scores, keys, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.softmax, F.softmax, Tensor.softmax) and args[0].ndim >= 3:
            logits = args[0]
            ahead = logits.ndim == 5  # ProphetNet's second softmax in a layer
            if ahead or logits.shape[-1] == self.keys:
                self.count += not ahead
                args = (self.biased(logits), *args[1:])
        if function is F.scaled_dot_product_attention and args[1].shape[-2] == self.keys:
            self.count += 1
            query, mask = args[0], kwargs["attn_mask"]
            empty = torch.zeros(*query.shape[:3], self.keys)
            hidden = empty if mask is None else empty.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else empty + mask
            kwargs = {**kwargs, "attn_mask": self.biased(hidden)}
        return function(*args, **kwargs)

    def biased(self, logits: Tensor) -> Tensor:
        """Head by head, row by row."""
        found = logits.clone()
        strength, scores = self.strengths[(self.count - 1) % len(self.strengths)], self.scores
        for row in range(len(scores)):
            for head, value in enumerate(strength):
                place = (row * len(strength) + head,) if logits.ndim == 3 else (row, ..., head) if logits.ndim == 5 else (row, head)
                own = found[row, :, head] if logits.ndim == 5 else found[place]
                own[..., : scores.shape[1]] += value * scores[row]
        return found
