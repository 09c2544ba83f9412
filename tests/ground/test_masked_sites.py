"""Attention that adds its mask to its logits is found by trying a mask per head on a likeness; what takes none says why."""

from __future__ import annotations

import pytest
import torch
import transformers
from kit.allocations import Allocations
from kit.broken import reclass, state_of
from kit.tiny_masked import HEADS, LAYERS, MASKED, make_masked
from torch.nn import functional as F
from transformers.models.bloom import modeling_bloom

from hf_steer import AttentionConfig, ConfigError, SteerConfig, patch_model
from hf_steer.families import resolve
from hf_steer.ground import masked_sites
from hf_steer.ground.additive import FORMS, OWN_FORMS, OneForAll
from hf_steer.ground.odd import REASONS
from hf_steer.testing.zoo import tiny_model

FORM = {
    "mpt": "MptAttention", "prophetnet": "ProphetNetNgramSelfAttention",
    **dict.fromkeys(("xglm", "mvp", "trocr", "led"), "unchecked"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKED)
def test_each_layer_is_found_once_with_its_heads_and_its_place_in_the_cache(kind):
    model = make_masked(kind)
    anatomy = resolve(model)
    assert anatomy.carried == "mask"
    assert [site.index for site in anatomy.layers] == list(range(LAYERS))
    if kind != "big_bird":  # exchanges what knows its place when it first runs, and has dynamic caches alone
        assert [site.slot for site in anatomy.layers] == list(range(LAYERS))
    assert {site.heads for site in anatomy.layers} == {HEADS}
    assert all(model.get_submodule(site.name) is site.module for site in anatomy.layers)
    assert {site.takes.form for site in anatomy.layers} == {FORM.get(kind, "plain")}
    assert not anatomy.left_out
    assert not any("encoder_attn" in site.name or "crossattention" in site.name for site in anatomy.layers)


def test_every_form_is_some_models():
    assert set(FORM.values()) | {"plain"} == {*FORMS, *OWN_FORMS}


@pytest.fixture
def likenesses(monkeypatch):
    """The decoders of which a likeness was made."""
    made, make = [], masked_sites.likeness_of

    def likeness_of(decoder):
        made.append(decoder)
        return make(decoder)

    monkeypatch.setattr(masked_sites, "likeness_of", likeness_of)
    return made


def fresh(**changes):
    """A model whose decoder's class has never been tried."""
    model = make_masked("bloom", **changes)
    reclass(model.transformer)
    return model


def test_a_decoder_is_tried_once_and_neither_run_nor_changed(likenesses):
    model, ran = fresh(), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
    before, drawn = state_of(model), torch.get_rng_state()
    for _ in range(3):
        assert len(resolve(model).layers) == LAYERS
    assert likenesses == [model.transformer]
    assert ran == []
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)


def test_trying_allocates_nothing_of_the_models_size(likenesses):
    model = fresh(vocab_size=100_000)
    assert sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) > 10_000_000
    with Allocations() as allocated:
        resolve(model)
    assert likenesses == [model.transformer]
    assert allocated.bytes < 10_000


def test_models_on_the_meta_device_are_found_too():
    with torch.device("meta"):
        model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4))
    assert len(resolve(model).layers) == 2


def attending(combine):
    """Bloom's attention with another way to use its mask."""

    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **kwargs):
        batch, queries, _ = hidden_states.shape
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        weights = F.softmax(combine(query @ key.transpose(-1, -2), attention_mask), -1)
        return residual + self.dense(self._merge_heads((weights @ value).reshape(batch * self.num_heads, queries, -1))), None

    return forward


def checked(mask):
    if mask.size() != (len(mask), 1, *mask.shape[2:]):
        raise ValueError
    return mask


WAYS = {
    "adds it": (lambda logits, mask: logits + mask, None),
    "adds it to the other": (lambda logits, mask: mask.add(logits), None),
    "adds a part": (lambda logits, mask: logits + mask[..., : logits.shape[-1]].to(logits.dtype), None),
    "checks it first": (lambda logits, mask: logits + checked(mask), "unchecked"),
    "blots out": (lambda logits, mask: logits.masked_fill(mask < 0, -1e9), "its code adds no mask to its logits"),
    "multiplies": (lambda logits, mask: logits * mask.exp(), "its code adds no mask to its logits"),
    "flattens it": (lambda logits, mask: logits + mask.view(len(mask), 1, *mask.shape[2:]), "takes no mask with a layer per head"),
    "ignores it": (lambda logits, mask: logits, "its code adds no mask to its logits"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_modules_code_does_with_its_mask_tells(way, monkeypatch):
    combine, told = WAYS[way]
    monkeypatch.setattr(modeling_bloom.BloomAttention, "forward", attending(combine))
    model = fresh()
    anatomy = resolve(model)
    if told is None or told in FORMS:
        assert {site.takes.form for site in anatomy.layers} == {told or "plain"}
        return
    assert not anatomy.layers
    with pytest.raises(ConfigError, match=f"a gaze cannot be put into this 'bloom' model: the attention of .*{told}"):
        patch_model(model, SteerConfig(attention=AttentionConfig()))


def test_a_mask_that_says_to_be_for_all_heads_computes_like_any_other():
    mask = torch.randn(2, 3, 4, 5).as_subclass(OneForAll)
    assert mask.size() == (2, 1, 4, 5)
    assert mask.size(1) == 1
    assert mask.shape == (2, 3, 4, 5)
    added = torch.zeros(2, 3, 4, 5) + mask
    assert type(added) is torch.Tensor
    assert added.size() == (2, 3, 4, 5)


ODD = {
    "xlnet": ("XLNetLMHeadModel", {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48, "vocab_size": 96}),
    "xlm": ("XLMWithLMHeadModel", {"emb_dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 96}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 96}),
    "rwkv": ("RwkvForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 96, "attention_hidden_size": 32}),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_one_says_why(kind):
    name, settings = ODD[kind]
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class(**settings))
    with pytest.raises(ConfigError) as raised:
        patch_model(model, SteerConfig(attention=AttentionConfig()))
    assert REASONS[kind] in str(raised.value)


@pytest.mark.parametrize("kind", ["gemma4_assistant", "gemma4_unified_assistant", "vibevoice"])
def test_a_model_around_a_known_decoder_says_why(kind):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("this release has none")
    try:
        model = tiny_model(kind)
    except ValueError as error:  # the sizes of the zoo do not fit together in an older release
        if transformers.__version__.startswith("5.24"):
            raise
        pytest.skip(str(error))
    with pytest.raises(ConfigError) as raised:
        patch_model(model, SteerConfig(attention=AttentionConfig()))
    assert REASONS[kind] in str(raised.value)


def test_the_reasons_are_sentences_about_models_that_there_are():
    known = set(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES) | {
        "blip_text_model", "dia_decoder", "musicgen_decoder", "musicgen_melody_decoder", "t5gemma2_decoder"
    }  # fmt: skip
    assert set(REASONS) <= known | {"deepseek_v4", "pi0", "gemma4_assistant", "gemma4_unified_assistant", "vibevoice"}
    assert all(len(reason) > 30 and not reason.endswith(".") for reason in REASONS.values())


def test_mamba_has_no_attention_to_steer():
    with torch.device("meta"):
        model = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1))
    assert "has no attention to steer" in resolve(model).reason
