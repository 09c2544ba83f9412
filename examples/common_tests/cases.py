"""Four models under transformers' common tests: a tiny configuration and inputs of each, and nothing of ours.

`ModelTesterMixin` is in the source distribution of transformers, the models' own test files are not, so these stand for them.
"""

import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin  # an empty stand-in: generation's tests are not distributed
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Qwen3NextForQuestionAnswering,
    Qwen3NextForSequenceClassification,
    Qwen3NextForTokenClassification,
    Qwen3NextModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)

IMAGE, VIDEO, VISION_START, VISION_END = 3, 4, 5, 6
TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EYE = {
    "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
EAR = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 200, "num_mel_bins": 8, "max_source_positions": 20,
    "max_target_positions": 40, "pad_token_id": 98, "bos_token_id": 98, "eos_token_id": 98, "decoder_start_token_id": 85,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
SEEN = {**TEXT, "seq_length": 13}
HEARD = {**EAR, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "encoder_seq_length": 20}
HYBRID = {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "hidden_act": "silu",
}  # fmt: skip


class Tester:
    """What the mixin asks for: numbers by name, a configuration, and inputs."""

    is_training = True
    batch_size = 3
    seq_length = 7
    num_labels = 3

    def __init__(self, case):
        self.case = case
        for name, value in case.sizes.items():
            setattr(self, name, value)

    def get_config(self):
        return self.case.configured()

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.case.shown(self)


class Case(ModelTesterMixin, GenerationTesterMixin):
    sizes = TEXT

    def setUp(self):
        self.model_tester = Tester(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is WhisperForConditionalGeneration:  # in none of the lists that the mixin asks
            inputs["labels"] = torch.zeros_like(inputs["decoder_input_ids"])
        return inputs


class Reads(Case):
    def shown(self, tester):
        ids = ids_tensor([tester.batch_size, tester.seq_length], tester.vocab_size)
        return {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class LlamaTest(Reads, unittest.TestCase):
    all_model_classes = (
        LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForQuestionAnswering, LlamaForTokenClassification,
    )  # fmt: skip

    def configured(self):
        return LlamaConfig(**TEXT)


class Qwen3NextTest(Reads, unittest.TestCase):
    all_model_classes = (
        Qwen3NextModel, Qwen3NextForCausalLM, Qwen3NextForSequenceClassification, Qwen3NextForQuestionAnswering,
        Qwen3NextForTokenClassification,
    )  # fmt: skip

    def configured(self):
        return Qwen3NextConfig(**{**TEXT, **HYBRID})


class Qwen2VLTest(Case, unittest.TestCase):
    sizes = SEEN
    all_model_classes = (Qwen2VLModel, Qwen2VLForConditionalGeneration)
    _is_composite = True

    def configured(self):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        special = {
            "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
        }  # fmt: skip
        return Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=EYE, **special)

    def shown(self, tester):
        ids = ids_tensor([tester.batch_size, tester.seq_length], tester.vocab_size - 10) + 10
        ids[:, 1:7] = torch.tensor([VISION_START, *[IMAGE] * 4, VISION_END])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE).int(),
            "pixel_values": floats_tensor([tester.batch_size * 16, 3 * 2 * 4 * 4]),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * tester.batch_size),
        }


class WhisperTest(Case, unittest.TestCase):
    sizes = HEARD
    all_model_classes = (WhisperModel, WhisperForConditionalGeneration)
    is_encoder_decoder = True
    test_missing_keys = False
    test_resize_embeddings = False  # the mixin asks for input_ids there

    def configured(self):
        return WhisperConfig(**EAR)

    def shown(self, tester):
        ids = ids_tensor([tester.batch_size, tester.seq_length], 80) + 2
        return {
            "input_features": floats_tensor([tester.batch_size, 8, 40]),
            "decoder_input_ids": ids,
            "decoder_attention_mask": torch.ones_like(ids),
        }


del Case, Reads  # bases, not to be collected
