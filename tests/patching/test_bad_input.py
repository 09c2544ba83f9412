"""Bad input: what, got, allowed, remedy; and the model as it was."""

from __future__ import annotations

import pytest
import torch
from kit.gazing import generate, logits, prompt_for, steer
from kit.tiny import make_model, make_prompt
from kit.tiny_encoders import make_encoder_model
from kit.versions import cached
from torch import nn
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

import hf_steer
from hf_steer import (
    AttentionConfig,
    ConfigError,
    PatchError,
    Saliency,
    SaliencyConfig,
    SaliencyError,
    SteerConfig,
    patch_model,
    unpatch_model,
    use_saliency,
)


def asking(**attention):
    attention.setdefault("saliency", SaliencyConfig(source=None))
    return SteerConfig(attention=AttentionConfig(**attention))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (asking(heads={3: (0,)}), "heads: layer 3 is not there. This model has 3 layers, 0 to 2.*hf-steer inspect"),
        (asking(heads={-4: "all"}), "layer -4 is not there"),
        (
            asking(heads={1: (0, 4), 2: (9,)}),
            r"heads \(4,\) asked for layer 1; heads \(9,\) asked for layer 2.*4 query heads each, 0 to 3",
        ),
        (asking(heads={2: "all", -1: (0,)}), "layer 2 is named twice, as 2 and -1"),
        (asking(strength={0: 1.0}), r"strength names layers \[0\], heads \[0, 1, 2\]"),
        (asking(heads={1: "all"}, strength={1: {0: 1.0}}), r"layer 1: strength names heads \[0\], steered are \[0, 1, 2, 3\]"),
        (asking(saliency=SaliencyConfig()), "needs a vision tower, which 'llama' lacks.*qwen2_vl.*source=None"),
        (SteerConfig(attention=None, base_model_type="qwen2"), "saved with a 'qwen2' model; this one is 'llama'"),
        ({"heads": "all"}, "must be a SteerConfig or an AttentionConfig; got dict"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(config, message):
    model = make_model("llama")
    inputs = prompt_for("llama")
    plain = logits(model, inputs)
    with pytest.raises(ConfigError, match=message):
        patch_model(model, config)
    assert not hf_steer.get_steer_status(model).patched
    assert torch.equal(logits(model, inputs), plain)


def test_a_vision_block_that_is_not_there_is_refused():
    config = SteerConfig(attention=AttentionConfig(saliency=SaliencyConfig(blocks=(0, 5))))
    with pytest.raises(ConfigError, match=r"blocks \[5\] are not there; the tower has 2 whose output the model reads, 0 to 1"):
        patch_model(make_model("qwen2_vl"), config)


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(PatchError, match="takes a transformers PreTrainedModel; got Linear"):
        patch_model(nn.Linear(2, 2), steer("llama"))


def test_a_model_without_attention_is_refused_for_its_own_reason():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=4))
    why = "gaze cannot be put into this 'mamba' model: MambaModel has no attention to steer.*state of another kind"
    with pytest.raises(ConfigError, match=why):
        patch_model(mamba, steer("llama"))
    assert patch_model(mamba, SteerConfig()) is mamba


def test_a_model_that_listens_only_is_refused_a_gaze_and_told_of_aligners():
    with pytest.raises(ConfigError, match=r"takes no token numbers.*Leave attention=None; aligners for audio can be had\."):
        patch_model(make_encoder_model("wav2vec2"), steer("llama"))


def test_patching_twice_does_nothing_or_names_unpatch_model():
    model = patch_model(make_model("llama"), steer("llama"))
    edits = model.hf_steer.undo
    assert patch_model(model, steer("llama")) is model
    assert model.hf_steer.undo is edits
    with pytest.raises(PatchError, match=r"another configuration; call hf_steer\.unpatch_model\(model\) first"):
        patch_model(model, steer("llama", strength=3.0))
    unpatch_model(model)
    patch_model(model, steer("llama", strength=3.0))


@pytest.mark.parametrize("call", [unpatch_model, hf_steer.print_trainable_parameters, lambda m: hf_steer.save_steering(m, "x")])
def test_calls_that_need_a_patched_model_say_so(call):
    with pytest.raises(PatchError, match=r"this LlamaForCausalLM is not patched; call hf_steer\.patch_model"):
        call(make_model("llama"))


def test_contexts_that_need_a_patched_model_say_so():
    model = make_model("llama")
    with pytest.raises(PatchError, match="not patched"), use_saliency(model, Saliency.from_tokens([[1.0]])):
        pass
    with pytest.raises(PatchError, match="not patched"), hf_steer.disable_steering(model):
        pass
    patch_model(model, SteerConfig())
    with pytest.raises(PatchError, match="attention=None"), use_saliency(model, Saliency.from_tokens([[1.0]])):
        pass
    patch_model(unpatch_model(model), steer("llama"))
    with pytest.raises(SaliencyError, match="takes a Saliency.*got list"), use_saliency(model, [[1.0]]):
        pass


@pytest.mark.parametrize("change", [-3, -1, 1, 2, 9])
@pytest.mark.parametrize("how", ["forward", "generate", "chunked"])
def test_saliency_of_the_wrong_length_is_refused_however_the_model_is_called(change, how):
    model = patch_model(make_model("llama"), steer("llama"))
    inputs = prompt_for("llama", rows=[[7]])
    statement = Saliency.from_tokens(torch.ones(1, 7 + change))
    with pytest.raises(SaliencyError, match=rf"shape \(1, {7 + change}\); the prompt needs \(1, 7\).*the shape of input_ids"):
        if how == "forward":
            logits(model, inputs, statement)
        else:
            generate(model, inputs, statement, **({"prefill_chunk_size": 3} if how == "chunked" else {}))


def test_saliency_of_the_wrong_batch_is_refused():
    model = patch_model(make_model("llama"), steer("llama"))
    with pytest.raises(SaliencyError, match=r"shape \(2, 7\); the prompt needs \(1, 7\)"):
        logits(model, prompt_for("llama", rows=[[7]]), Saliency.from_tokens(torch.ones(2, 7)))


@pytest.mark.filterwarnings("ignore:what is pointed at covers")
def test_constant_saliency_changes_nothing():
    model = make_model("qwen2_vl")
    inputs = prompt_for("qwen2_vl")
    plain = logits(model, inputs)
    patch_model(model, steer("qwen2_vl"))
    whole = Saliency.from_mask(torch.ones(9, 9)) + Saliency.from_map(torch.full((3, 4), 0.3), image=1)
    assert torch.equal(logits(model, inputs, whole), plain)
    assert torch.equal(logits(model, inputs, Saliency.from_tokens(torch.full(inputs["input_ids"].shape, 2.5))), plain)


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_an_image_token_count_that_does_not_match_is_refused(how):
    model = patch_model(make_model("qwen2_vl"), steer("qwen2_vl"))
    inputs = make_prompt("qwen2_vl", [[3, ("image", 2, 3), 4]])
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    inputs["pixel_values"] = inputs["pixel_values"][:16]
    call = logits if how == "forward" else generate
    with pytest.raises(SaliencyError, match=r"image token count does not match: .* \[6\] image tokens, .* inputs make \[4\]"):
        call(model, inputs)
    lacking = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(SaliencyError, match=r"image token count does not match: .* \[6\] image tokens, .* inputs make \[\]"):
        call(model, lacking)


def test_a_picture_that_the_prompt_lacks_is_refused():
    model = patch_model(make_model("qwen2_vl"), steer("qwen2_vl"))
    inputs = prompt_for("qwen2_vl")
    with pytest.raises(SaliencyError, match="no image 2 in row 0: the prompt has 3 rows, and row 0 holds 2 of them"):
        logits(model, inputs, Saliency.from_mask(torch.eye(3), image=2))
    with pytest.raises(SaliencyError, match="no image 0 in row 1"):
        generate(model, inputs, Saliency.from_mask(torch.eye(3), row=1))


def test_a_cache_for_other_rows_is_refused():
    model = patch_model(make_model("llama"), steer("llama"))
    cache = DynamicCache(config=model.config)
    logits(model, prompt_for("llama", rows=[[7], [7], [7]]), Saliency.from_tokens(torch.randn(3, 7)), **cached(cache))
    with pytest.raises(SaliencyError, match="saliency has 3 rows, this call has 2. Start from a fresh cache"), torch.no_grad():
        model(torch.tensor([[5], [6]]), **cached(cache))
