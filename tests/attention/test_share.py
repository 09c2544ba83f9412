"""A share of attention that is kept: exact in each head and query, by every implementation that can know what there is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kit.asking import prompt
from kit.calls import call_of
from kit.tiny import make_model

from hf_steer import AttentionConfig, GateConfig, Saliency, SaliencyConfig, patch_model, unpatch_model, use_strength
from hf_steer.attention import bias_for_share, chunks_of, logits_in_chunks
from hf_steer.errors import ConfigError, PatchError
from hf_steer.values import HeadBias

SHARE = 0.6
SPAN = (2, 5)


def sharing(**how):
    return AttentionConfig(**{"share": SHARE, "saliency": SaliencyConfig(source=None), "queries": "all", **how})


def span(inputs) -> Saliency:
    scores = torch.zeros(inputs["input_ids"].shape)
    scores[:, slice(*SPAN)] = 1
    return Saliency.from_tokens(scores)


def shares(weights) -> torch.Tensor:
    return weights[..., slice(*SPAN)].sum(-1)


def test_each_head_and_query_gives_the_span_its_share_and_no_more():
    """By weights that the model itself hands out, one layer steered, so that all that changes is its own softmax."""
    model, inputs = make_model("qwen2", "eager"), prompt(tokens=12, rows=2)
    with torch.no_grad():
        before = model(**inputs, output_attentions=True).attentions[1]
        patch_model(model, sharing(heads={1: (0, 2)}))
        after = model(**inputs, output_attentions=True, saliency=span(inputs)).attentions[1]
    told, plain = shares(after), shares(before)
    assert torch.equal(after[:, 1], before[:, 1])
    alone = torch.zeros(12, dtype=torch.bool)
    alone[: SPAN[0]] = True  # these see nothing of it
    expected = torch.where(alone, plain, plain.clamp(min=SHARE))
    torch.testing.assert_close(told[:, [0, 2]], expected[:, [0, 2]], rtol=1e-4, atol=1e-5)
    assert (plain[:, [0, 2], SPAN[1] :] < SHARE).any()
    rest = torch.ones(12, dtype=torch.bool)
    rest[slice(*SPAN)] = False
    ratio = after[:, 0, -1, rest] / before[:, 0, -1, rest]  # what is left is divided as before
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("padded", [False, True])
def test_all_implementations_give_what_eager_gives(implementation, padded):
    torch.compiler.reset()  # with more than ten sizes left open, FlexAttention on CPUs does not compile (torch 2.14)
    inputs = prompt(tokens=12, rows=2)
    if padded:
        inputs["attention_mask"][0, :2] = 0
    found = []
    for name in ("eager", implementation):
        model = patch_model(make_model("qwen2", name), sharing())
        with torch.no_grad():
            found.append(model(**inputs, saliency=span(inputs)).logits[inputs["attention_mask"].bool()])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_steps_on_a_cache_keep_it_too():
    model, inputs = patch_model(make_model("qwen2"), sharing()), prompt(tokens=12, rows=2)
    said = model.generate(**inputs, saliency=span(inputs), max_new_tokens=4, min_new_tokens=4, do_sample=False,
                          return_dict_in_generate=True, output_logits=True)  # fmt: skip
    whole = {"input_ids": said.sequences, "attention_mask": torch.ones_like(said.sequences)}
    with torch.no_grad():
        once = model(**whole, saliency=span(whole)).logits
    torch.testing.assert_close(torch.stack(said.logits, 1), once[:, 11:15], rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_the_formula_in_float64():
    """The same attention written down plainly: softmax, its share, the missing logit, softmax again."""
    model, inputs = make_model("qwen2", "eager").double(), prompt(tokens=9)
    patch_model(model, sharing(heads={1: "all"}), freeze_base=False)
    model(**inputs, saliency=span(inputs)).logits.square().mean().backward()
    layer = model.model.layers[1].self_attn
    got = layer.q_proj.weight.grad.clone()
    unpatch_model(model).zero_grad()
    from transformers.integrations.sdpa_attention import repeat_kv
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def plainly(module, query, key, value, mask, scaling, **rest):
        key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
        logits = query @ key.transpose(2, 3) * scaling + mask
        if module.layer_idx == 1:
            own = shares(logits.softmax(-1))
            there = own.clamp(1e-9, 1 - 1e-9)
            missing = torch.log(SHARE * (1 - there) / (there * (1 - SHARE)))
            raised = torch.where((own > 0) & (own < SHARE), missing.clamp(min=0), torch.zeros_like(own))
            inside = raised[..., None].expand(-1, -1, -1, SPAN[1] - SPAN[0])
            logits = logits + torch.nn.functional.pad(inside, (SPAN[0], 9 - SPAN[1]))
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("plainly", plainly)
    try:
        model.config._attn_implementation = "plainly"
        mask = torch.full((9, 9), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]
        model(input_ids=inputs["input_ids"], attention_mask=mask).logits.square().mean().backward()
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("plainly")
    expected = layer.q_proj.weight.grad
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("how", "prompt_share"),
    [
        ({"schedule": {"prompt": 0.5}}, 0.5 * SHARE), ({"schedule": {"prompt": 0.0}}, 0.0),
        ({"gate": GateConfig("entropy", initial=0.25)}, 0.25 * SHARE), ({"gate": GateConfig("entropy", initial=1.0)}, SHARE),
    ],
)  # fmt: skip
def test_a_schedule_and_a_gate_say_how_much_of_the_share_is_kept(how, prompt_share):
    model, inputs = make_model("qwen2", "eager"), prompt(tokens=12, rows=2)
    with torch.no_grad():
        before = shares(model(**inputs, output_attentions=True).attentions[1])[:, :, SPAN[0] : -1]
        patch_model(model, sharing(heads={1: "all"}, **{**({"queries": "auto"} if "schedule" in how else {}), **how}))
        after = shares(model(**inputs, output_attentions=True, saliency=span(inputs)).attentions[1])
    assert (before < prompt_share).any() or not prompt_share
    sees_more = slice(SPAN[0], -1)
    torch.testing.assert_close(after[:, :, sees_more], before.clamp(min=prompt_share), rtol=1e-4, atol=1e-5)
    if "schedule" in how:
        assert (after[:, :, -1] > SHARE - 1e-4).all()


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"from 0 to 1; got \{'prompt': 2.0\}"):
        sharing(schedule={"prompt": 2.0})
    with pytest.raises(ConfigError, match="above 0 and below 1; got 1.0"):
        AttentionConfig(share=1.0)
    with pytest.raises(ConfigError, match="both say how hard"):
        AttentionConfig(share=0.5, strength=2.0)
    with pytest.raises(ConfigError, match="preserve_mass=True forbids"):
        AttentionConfig(share=0.5, saliency=SaliencyConfig(preserve_mass=True))
    model = patch_model(make_model("qwen2"), sharing())
    with pytest.raises(PatchError, match="no strength says how hard"):
        use_strength(model, 2.0)


def noted(kept: list[int], own: torch.Tensor) -> torch.Tensor:
    kept.append(own.numel())
    return own


def test_gradients_hold_no_logits(monkeypatch):
    """What autograd keeps for backward is no tensor of queries × keys, and the gradients are the same however it is cut."""
    keys = 40
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, keys, 8, generator=generator, requires_grad=True) for heads in (4, 2))
    inside = torch.zeros(1, keys, 1)
    inside[:, slice(*SPAN)] = 1
    bias = HeadBias(torch.ones(1, 4, 1, 1), inside, share=SHARE)
    mask = torch.ones(keys, keys, dtype=torch.bool).tril()[None, None]
    call = call_of(torch.nn.Identity(), query, key, key, mask, bias, kwargs={"scaling": 0.3})
    found = []
    for most in (1 << 22, 4 * keys * 7):
        monkeypatch.setattr(chunks_of, "__defaults__", (slice(None), most))
        monkeypatch.setattr(logits_in_chunks, "__kwdefaults__", {"queries": slice(None), "scores_per_chunk": most})
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(noted, kept), lambda own: own):
            needed = bias_for_share(call, bias).query
        assert max(kept, default=0) < keys * keys
        found.append(torch.autograd.grad(needed.square().sum(), (query, key)))
        assert found[-1][0].abs().max() > 0.1
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_run_again_in_backward_give_the_same_gradients(reentrant):
    found = []
    for checkpointed in (False, True):
        model, inputs = make_model("qwen2").train(), prompt(tokens=9)
        patch_model(model, sharing(), freeze_base=False)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**inputs, saliency=span(inputs), use_cache=False).logits.square().mean().backward()
        found.append(model.model.layers[1].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*found)
