"""Small values for the numbers of a configuration, by what their names say."""

from __future__ import annotations

import re
from functools import cache

WORDS, FEATURES, INNER, HEADS, KEY_HEADS, HEAD_SIZE, LENGTH = 320, 64, 48, 4, 2, 16, 128
MAMBA_HEADS = 8

SIZES: tuple[tuple[str, int], ...] = (
    # state spaces and linear attention, whose sizes follow from one another
    (r"mamba_expand|expand", 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", MAMBA_HEADS),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 2 * FEATURES // MAMBA_HEADS),
    (r"mamba_d_ssm|attention_hidden_size", 2 * FEATURES),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"mamba_n_groups|mamba_ngroups|n_groups|num_expert_group", 1),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"linear_num_key_heads", 2),
    (r"(mamba_)?chunk_size", 16),
    # attention through a bottleneck (DeepSeek's), and its index of keys
    (r"q_lora_rank", 24),
    (r"kv_lora_rank|o_lora_rank", 16),
    (r"qk_(rope|nope)_head_dim", HEAD_SIZE // 2),
    # heads
    (r"(\w+_)?(num_key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|num_query_groups|num_attention_groups)", KEY_HEADS),
    (r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?|linear_num_value_heads)", HEADS),
    (r"(\w+_)?(head_dim|d_kv|kv_channels|attention_head_size|d_head|rotary_dim)", HEAD_SIZE),
    # widths
    (r"(\w+_)?(ffn_hidden_size|intermediate_size(_mlp)?|ffn_dim|d_ff|dff|dim_ff|mlp_dim|fc_dim)", INNER),
    (r"n_inner|d_inner|feed_forward_size|share_expert_dim|variant_adapter_intermediate|block_ff_dim", INNER),
    (r"(\w+_)?(hidden_(size|dim)|d_model|dim_model|n_embd|emb(ed(ding)?)?_dim|embedding_size|(projection|output)_dim)", FEATURES),
    (r"dim|word_embed_proj_dim|lru_width|classifier_proj_size|input_size", FEATURES),
    # mixtures of experts
    (r"(num_experts|num_experts_per|experts|top_k_experts|moe_top_?k|moe_k)(_per_tok|_per_token)|moe_num_experts_per_tok", 2),
    (r"moe_top_?k|moe_k|top_k_experts|num_selected_experts|num_experts_per_tok(en)?", 2),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts|n_experts|zero_expert_num", 4),
    (r"n_group|topk_group|n_shared_experts|(moe_)?num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    # tables
    (r"(\w+_)?vocab_size(_per_layer_input|_override)?", WORDS),
    (r"(\w+_)?max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|max_(target|text)_positions", LENGTH),
    (r"context_length|model_max_length", LENGTH),
    (r"(\w*_)?sliding_window(_size)?|attention_(chunk|window)_size|local_attention(_window_len)?|keep_window_size", 64),
    # pictures
    (r"image_size", 32),
    (r"patch_size|window_size", 8),
    (r"num_position_embeddings", 64),
    (r"mm_tokens_per_image|image_seq_length|num_query_tokens|num_image_tokens|latent_query_num", 4),
    # sounds
    (r"num_mel_bins|n_mels|n_mel_bins|feat_extract_dim", 16),
    (r"max_source_positions", 40),
    (r"num_conv_pos_embeddings|subsampling_conv_channels", 8),
    (r"num_conv_pos_embedding_groups|num_feat_extract_layers", 2),
)
"""Pattern of a whole name -> the greatest value that is left of its number; the first that fits counts."""

LISTS: dict[str, list[int]] = {"conv_dim": [16, 16], "conv_stride": [4, 2], "conv_kernel": [8, 4]}
"""Lists of numbers that are replaced as a whole: the first convolutions of models that hear samples."""

DEPTHS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|depth|num_blocks|layers|(num_|n_)?(encoder|decoder)_layers|(\w+_)?(encoder|decoder)_layers"
    r"|(encoder|decoder)_num_(hidden_)?layers|\w*conf_num_hidden_layers"
)
"""Names of numbers of layers."""


@cache
def greatest(name: str) -> int | None:
    """The value that the number of this name is cut to; None for one that stays."""
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
