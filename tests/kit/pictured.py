"""Tiny random models of families that see, each with the processor that belongs to it, built without files."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from kit.tiny import spread
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = tuple(f"w{number}" for number in range(20))
SIDE, PATCH = 32, 4
"""Of a tower with a fixed square, in pixels."""
_TEXT = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SQUARE = {**_VIT, "image_size": SIDE, "patch_size": PATCH}
_QWEN = {
    "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2, "patch_size": PATCH,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_TINY_PIXELS = {"size": {"shortest_edge": 64, "longest_edge": 12000}}


def _sized(side: int = SIDE) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


@dataclass(frozen=True)
class Kind:
    """How to build one family.

    Attributes:
        model: name of the class.
        processor: name of the class.
        image_processor: name of the class.
        pixels: what its image processor is told.
        vision: configuration of the tower.
        text: what is added to the configuration of the decoder.
        own: what is added to the configuration of the whole.
        tokens: attribute of the tokenizer -> special token, as the processor asks for them.
        others: further special tokens.
        image: the token that the prompt's placeholders are, where `tokens["image_token"]` is not.
        written: what a user writes for a picture.
        told: what the processor is told.
        video_processor: name of the class, where the processor wants one.

    SmolVLM's own processor is an Idefics3 processor that also reads videos, with a package that spells numbers out.
    """

    model: str
    processor: str
    image_processor: str
    pixels: Mapping[str, Any]
    vision: Mapping[str, Any]
    text: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=lambda: {"image_token": "<image>"})
    others: tuple[str, ...] = ()
    image: str | None = None
    written: str = "<image>"
    told: Mapping[str, Any] = field(default_factory=dict)
    video_processor: str | None = None


_QWEN_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}  # fmt: skip
_GLM_TOKENS = {"image_token": "<|image|>", "video_token": "<|video|>"}
_GLM_MORE = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")


def _qwen(model: str, *, text: Any = None, vision: Any = None, own: Any = None, newer: bool = True) -> Kind:
    return Kind(
        model, "Qwen3VLProcessor" if newer else "Qwen2VLProcessor", "Qwen2VLImageProcessor",
        {**_TINY_PIXELS, "patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2},
        {**_QWEN, **({"num_position_embeddings": 64} if newer else {}), **(vision or {})}, text={**_MROPE, **(text or {})},
        own=own or {}, tokens=_QWEN_TOKENS, written="<|vision_start|><|image_pad|><|vision_end|>",
        video_processor="Qwen3VLVideoProcessor" if newer else "Qwen2VLVideoProcessor",
    )  # fmt: skip


def _glm(model: str, processor: str, images: str, videos: str, *, text: Any = None) -> Kind:
    rope = {"rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
    return Kind(
        model, processor, images, {"size": {"shortest_edge": 256, "longest_edge": 12000}, "patch_size": PATCH, "merge_size": 2},
        {**_QWEN, "image_size": SIDE}, text={**rope, **(text or {})},
        tokens=_GLM_TOKENS, others=_GLM_MORE, written="<|begin_of_image|><|image|><|end_of_image|>", video_processor=videos,
    )  # fmt: skip


def _llava_next(vision: dict[str, Any], strategy: str, films: str = "") -> Kind:
    return Kind(
        f"LlavaNext{films}ForConditionalGeneration", "LlavaNextProcessor", "LlavaNextImageProcessor",
        {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "image_grid_pinpoints": _PINPOINTS},
        vision, text={"model_type": "llama"},
        own={"image_grid_pinpoints": _PINPOINTS, "vision_feature_select_strategy": strategy, "vision_feature_layer": -1},
        told={
            "patch_size": PATCH, "vision_feature_select_strategy": strategy,
            "num_additional_image_tokens": int(strategy == "default"),
        },
    )  # fmt: skip


_OMNI = {
    "vision_start_token_id": 21,
    "audio_config": {
        "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 32,
        "num_mel_bins": 8, "max_source_positions": 20, "n_window": 4, "downsample_hidden_size": 4,
    },
}  # fmt: skip
_PINPOINTS = [[SIDE * rows, SIDE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]
_IDEFICS = {
    "pixels": {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}, "return_row_col_info": True},
    "vision": _SQUARE, "text": {"model_type": "llama"}, "own": {"scale_factor": 2},
    "others": (
        "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "\n", "\n\n",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    ),
    "told": {"image_seq_len": 16},
}  # fmt: skip
_SIGLIP = {**_SQUARE, "model_type": "siglip_vision_model", "vision_use_head": False}

KINDS: Mapping[str, Kind] = {
    "qwen2_vl": _qwen("Qwen2VLForConditionalGeneration", newer=False, vision={"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLForConditionalGeneration", newer=False, vision={"window_size": 16, "fullatt_block_indexes": [1]}
    ),
    "qwen3_vl": _qwen("Qwen3VLForConditionalGeneration", vision={"deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": _qwen("Qwen3VLMoeForConditionalGeneration", vision={"deepstack_visual_indexes": [0]}, text=_MOE),
    "qwen3_5": _qwen("Qwen3_5ForConditionalGeneration", text=_HYBRID),
    "qwen3_5_moe": _qwen("Qwen3_5MoeForConditionalGeneration", text={**_HYBRID, **_MOE, "shared_expert_intermediate_size": 24}),
    "qwen2_5_omni_thinker": _qwen(
        "Qwen2_5OmniThinkerForConditionalGeneration", newer=False, vision={"window_size": 16, "fullatt_block_indexes": [1]},
        own=_OMNI,
    ),
    "qwen3_omni_moe_thinker": _qwen(
        "Qwen3OmniMoeThinkerForConditionalGeneration", newer=False, text=_MOE, own=_OMNI,
        vision={"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
    ),
    "kimi_k25": Kind(
        "Kimi_K25ForConditionalGeneration", "Kimi_K25Processor", "Kimi_K25ImageProcessor", {"patch_size": PATCH, "merge_size": 2},
        {**_VIT, "patch_size": PATCH, "merge_kernel_size": [2, 2]},
        text={
            "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 2, "head_dim": 4,
        },
        own={"projection_hidden_size": 16},
        tokens={"image_token": "<|media_pad|>", "video_token": "<|video|>"}, written="<|media_pad|>",
        video_processor="Kimi_K25VideoProcessor",
    ),
    "glm4v": _glm("Glm4vForConditionalGeneration", "Glm4vProcessor", "Glm4vImageProcessor", "Glm4vVideoProcessor"),
    "glm4v_moe": _glm(
        "Glm4vMoeForConditionalGeneration", "Glm4vProcessor", "Glm4vImageProcessor", "Glm4vVideoProcessor",
        text={"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    ),
    "glm46v": _glm("Glm46VForConditionalGeneration", "Glm46VProcessor", "Glm46VImageProcessor", "Glm46VVideoProcessor"),
    "gemma3": Kind(
        "Gemma3ForConditionalGeneration", "Gemma3Processor", "Gemma3ImageProcessor", _sized(), _SIGLIP,
        own={"mm_tokens_per_image": 16},
        tokens={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        others=("\n\n",), written="<start_of_image>", told={"image_seq_length": 16},
    ),
    "paligemma": Kind(
        "PaliGemmaForConditionalGeneration", "PaliGemmaProcessor", "SiglipImageProcessor", {**_sized(), "image_seq_length": 64},
        _SIGLIP, text={"model_type": "gemma"}, own={"projection_dim": 32},
    ),
    "deepseek_vl": Kind(
        "DeepseekVLForConditionalGeneration", "DeepseekVLProcessor", "DeepseekVLImageProcessor", {**_sized(), "min_size": 14},
        _SIGLIP, text={"model_type": "llama"}, told={"num_image_tokens": 64},
    ),
    "janus": Kind(
        "JanusForConditionalGeneration", "JanusProcessor", "JanusImageProcessor", {**_sized(96), "min_size": 14},
        {**_SQUARE, "image_size": 96, "projection_dim": 32, "mlp_ratio": 2.0}, text={"model_type": "llama"},
        own={
            "vq_config": {"base_channels": 32, "embed_dim": 8, "num_embeddings": 8, "num_res_blocks": 1, "channel_multiplier": [1]}
        },
        tokens={"image_token": "<image>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
    ),
    "gemma4": Kind(
        "Gemma4ForConditionalGeneration", "Gemma4Processor", "Gemma4ImageProcessor",
        {"patch_size": 2, "max_soft_tokens": 70, "pooling_kernel_size": 3},
        {
            **_VIT, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 2, "pooling_kernel_size": 3,
            "position_embedding_size": 512,
        },
        text={"vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
        tokens={
            "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
            "boa_token": "<|audio>", "eoa_token": "<audio|>", "video_token": "<|video|>",
        },
        written="<|image|>", video_processor="Gemma4VideoProcessor",
    ),
    "internvl": Kind(
        "InternVLForConditionalGeneration", "InternVLProcessor", "GotOcr2ImageProcessor", {**_sized(), "crop_to_patches": True},
        {**_VIT, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}, text={"model_type": "qwen2"},
        own={"image_seq_length": 16},
        tokens={
            "context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
            "video_token": "<video>",
        },
        image="<IMG_CONTEXT>", written="<IMG_CONTEXT>", told={"image_seq_length": 16}, video_processor="InternVLVideoProcessor",
    ),
    "aya_vision": Kind(
        "AyaVisionForConditionalGeneration", "AyaVisionProcessor", "GotOcr2ImageProcessor", {**_sized(), "crop_to_patches": True},
        _SIGLIP, text={"model_type": "cohere2"}, own={"downsample_factor": 2, "adapter_layer_norm_eps": 1e-5},
        others=(
            "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL",
            *(f"TILE_{number}" for number in range(1, 13)),
        ),
        image="<|IMG_PATCH|>", told={"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2},
    ),
    "cohere2_vision": Kind(
        "Cohere2VisionForConditionalGeneration", "Cohere2VisionProcessor", "Cohere2VisionImageProcessor",
        {**_sized(), "patch_size": PATCH}, _SIGLIP, text={"model_type": "cohere2"}, own={"downsample_factor": 2},
        tokens={
            "image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        written="<|IMG_PATCH|>",
    ),
    "llama4": Kind(
        "Llama4ForConditionalGeneration", "Llama4Processor", "Llama4ImageProcessor", {**_sized(), "max_patches": 6},
        {
            **_SQUARE, "pixel_shuffle_ratio": 0.5, "intermediate_size": 64, "projector_input_dim": 32, "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        text={"intermediate_size_mlp": 48, "num_local_experts": 2},
        others=(
            "<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
        ),
        tokens={}, image="<|patch|>", written="<|image|>", told={"patch_size": PATCH, "pixel_shuffle_ratio": 0.5},
    ),
    "idefics3": Kind("Idefics3ForConditionalGeneration", "Idefics3Processor", "Idefics3ImageProcessor", **_IDEFICS),
    "smolvlm": Kind("SmolVLMForConditionalGeneration", "Idefics3Processor", "SmolVLMImageProcessor", **_IDEFICS),
    "llava": Kind(
        "LlavaForConditionalGeneration", "LlavaProcessor", "CLIPImageProcessor",
        {"size": {"shortest_edge": SIDE}, "crop_size": SIDE}, {**_SQUARE, "model_type": "clip_vision_model"},
        text={"model_type": "llama"}, own={"vision_feature_layer": -1},
        told={"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "vipllava": Kind(
        "VipLlavaForConditionalGeneration", "LlavaProcessor", "CLIPImageProcessor",
        {"size": {"shortest_edge": SIDE}, "crop_size": SIDE}, {**_SQUARE, "model_type": "clip_vision_model"},
        text={"model_type": "llama"}, own={"vision_feature_layers": [-1, -2]},
        told={"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "pixtral": Kind(
        "LlavaForConditionalGeneration", "PixtralProcessor", "PixtralImageProcessor",
        {"size": {"longest_edge": 64}, "patch_size": {"height": PATCH, "width": PATCH}},
        {**_SQUARE, "image_size": 128, "model_type": "pixtral", "head_dim": 8}, text={"model_type": "mistral"},
        own={"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        tokens={}, others=("[IMG]", "[IMG_BREAK]", "[IMG_END]"), image="[IMG]", written="[IMG]", told={"patch_size": PATCH},
    ),
    "mistral3": Kind(
        "Mistral3ForConditionalGeneration", "PixtralProcessor", "PixtralImageProcessor",
        {"size": {"longest_edge": 64}, "patch_size": {"height": PATCH * 2, "width": PATCH * 2}},
        {**_SQUARE, "image_size": 128, "model_type": "pixtral", "head_dim": 8}, text={"model_type": "mistral"},
        own={"spatial_merge_size": 2, "vision_feature_layer": -1}, tokens={}, others=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        image="[IMG]", written="[IMG]", told={"patch_size": PATCH, "spatial_merge_size": 2},
    ),
    "llava_next_video": _llava_next({**_SQUARE, "model_type": "clip_vision_model"}, "default", "Video"),
    "llava_next": _llava_next({**_SQUARE, "model_type": "clip_vision_model"}, "default"),
    "granite_vision": _llava_next(_SIGLIP, "full"),
    "llava_onevision": Kind(
        "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor",
        {**_sized(), "image_grid_pinpoints": _PINPOINTS}, _SIGLIP, text={"model_type": "qwen2"},
        own={"image_grid_pinpoints": _PINPOINTS, "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        tokens={"image_token": "<image>", "video_token": "<video>"},
        told={"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"},
        video_processor="LlavaOnevisionVideoProcessor",
    ),
}  # fmt: skip


ACROSS = Kind(
    "MllamaForConditionalGeneration", "MllamaProcessor", "MllamaImageProcessor", {**_sized(), "max_image_tiles": 4},
    {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH, "max_num_tiles": 4, "vision_output_dim": 32, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    },
    text={"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    tokens={"image_token": "<|image|>"}, written="<|image|>",
)  # fmt: skip
"""Mllama, whose pictures are no tokens of the prompt."""


def make_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """Words `w0` to `w19`, and the family's special tokens."""
    special = dict.fromkeys([*kind.tokens.values(), *kind.others, *([kind.image] if kind.image else []), "<image>"])
    vocabulary = {token: number for number, token in enumerate(("<pad>", "<s>", "<unk>", *WORDS, *special))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left",
        extra_special_tokens=dict(kind.tokens),
    )
    made.add_tokens([transformers.AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    return made


def make_processor(kind: Kind) -> Any:
    parts = {"image_processor": getattr(transformers, kind.image_processor)(**kind.pixels), "tokenizer": make_tokenizer(kind)}
    if kind.video_processor is not None:
        parts["video_processor"] = getattr(transformers, kind.video_processor)()
    if kind.processor == "Gemma4Processor":
        parts["feature_extractor"] = transformers.Gemma4AudioFeatureExtractor()
    return getattr(transformers, kind.processor)(**parts, **kind.told)


def make_pictured_model(kind: Kind, tokenizer: Any, *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model_class = getattr(transformers, kind.model)
    placeholder = tokenizer.convert_tokens_to_ids(kind.image or kind.tokens["image_token"])
    numbers = {"image_token_id": placeholder, "image_token_index": placeholder}
    fields = model_class.config_class.__dataclass_fields__
    ids = {name: number for name, number in numbers.items() if name in fields}
    if "video_token_id" in fields:
        ids["video_token_id"] = 150
    config = model_class.config_class(
        text_config={**_TEXT, **kind.text}, vision_config=dict(kind.vision), **{**ids, **kind.own}
    )
    model = model_class(config)
    spread(model, seed)
    return model.eval()


def make_model_without_places(seed: int = 0) -> Any:
    """An Idefics2, whose four tokens of a picture, all of id 30, come out of a resampler."""
    torch.manual_seed(seed)
    resampler = {
        "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "num_key_value_heads": 1,
        "resampler_head_dim": 8,
    }  # fmt: skip
    config = transformers.Idefics2Config(
        text_config={**_TEXT, "model_type": "mistral"}, vision_config=_SQUARE, perceiver_config=resampler, image_token_id=30
    )
    model = transformers.Idefics2ForConditionalGeneration(config)
    spread(model, seed)
    return model.eval()


def noise_picture(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """`(height, width, 3)` random colours."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@contextlib.contextmanager
def without_mixing(model: Any) -> Iterator[None]:
    """The towers' attention adds nothing, so that a token tells of its own patches alone."""

    def silent(module: Any, args: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    towers = [module for name, module in model.named_modules() if "vis" in name.split(".")[-1] or name.endswith("tower")]
    attending = {part for tower in towers for part in tower.modules() if type(part).__name__.endswith("Attention")}
    assert attending
    hooks = [part.register_forward_hook(silent) for part in attending]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def features_of(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """`(placeholder tokens, features)` that the model puts in the placeholders' stead, in their order."""
    owner = model if hasattr(model, "get_image_features") else model.base_model
    names = inspect.signature(inspect.unwrap(type(owner).get_image_features)).parameters
    given = {name: value for name, value in inputs.items() if name in names}
    for name, parameter in names.items():  # up to 5.14 Llama 4 asks for a setting of its own
        if name not in ("self", *given) and parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            given[name] = getattr(model.config.vision_config, name)
    with torch.no_grad(), without_mixing(model):
        output = owner.get_image_features(**given)
    found = output.last_hidden_state if output.pooler_output is None else output.pooler_output  # Llama 4 pools in its tower
    parts = list(found) if isinstance(found, (list, tuple)) else [found]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
