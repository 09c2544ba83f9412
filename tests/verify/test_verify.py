"""`hf_steer.verify` on models that keep what is promised: patched or not, in what type they are, and afterwards as before."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from kit.gazing import gaze, logits, prompt_for, steer
from kit.tiny import IMPLEMENTATIONS, SEEING, UNCOMMON, make_model
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model
from kit.versions import repeats_pictures
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from hf_steer import (
    AlignerConfig,
    AttentionConfig,
    ConfigError,
    ContractError,
    PatchError,
    Saliency,
    SaliencyConfig,
    SaliencyError,
    SteerConfig,
    disable_steering,
    get_steer_status,
    patch_model,
    unpatch_model,
    use_saliency,
    verify,
)
from hf_steer.patching.scopes import steering_of
from hf_steer.testing.state import changes_between, state_of
from hf_steer.verify import BUDGET, PROMISES

CASES = [
    *((family, implementation) for family in ("qwen2", *SEEING) for implementation in IMPLEMENTATIONS),
    *((family, implementation) for family, able in UNCOMMON.items() for implementation in able),
    *(("llava", implementation) for implementation in IMPLEMENTATIONS),
]
DTYPES = (torch.float32, torch.bfloat16)


def case_of(family, implementation="sdpa", dtype=torch.float32):
    made = family == "llava"
    model = make_encoder_model(family, implementation=implementation) if made else make_model(family, implementation)
    inputs = make_encoder_inputs(family) if made else prompt_for(family)
    return model.to(dtype), {name: own.to(dtype) if own.is_floating_point() else own for name, own in inputs.items()}


def unshown(report):
    return {check.name: check.why for check in report.unshown}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_all_holds_for_a_model_as_it_lies_there(family, implementation, dtype):
    model, inputs = case_of(family, implementation, dtype)
    reads = family not in (*SEEING, "llava")
    odd = not reads and not repeats_pictures(family)  # transformers dealt the pictures of a row to the wrong beams
    asked = [name for name in PROMISES if not (odd and name == "beams")]
    report = verify(model, inputs, only=asked)
    assert report.holds, str(report)
    assert [check.name for check in report.checks] == asked
    assert set(unshown(report)) == ({"aligners"} if reads else set())
    assert (report.family, report.implementation, report.patched) == (family, implementation, False)
    assert not get_steer_status(model).patched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_a_patched_model_is_verified_with_the_patch_that_it_has(family, dtype):
    model, inputs = case_of(family, dtype=dtype)
    patch_model(model, steer(family))
    steering, before = steering_of(model), state_of(model)
    report = verify(model, inputs)
    assert report.holds, str(report)
    assert report.patched
    assert set(unshown(report)) == {"aligners"}
    assert steering_of(model) is steering
    assert changes_between(before, state_of(model)) == []
    assert "6 heads in 2 layers" in {check.name: check.why for check in report.checks}["receipt"]


def test_what_a_patch_has_learned_stays_and_is_saved_and_loaded():
    model, inputs = case_of("llava")
    aligner = AlignerConfig(modality="image", placement="output", num_experts=2)
    attention = AttentionConfig(heads={1: (0, 3)}, strength="trainable", saliency=SaliencyConfig(source=None), queries="all")
    patch_model(model, SteerConfig(attention=attention, aligners=(aligner,)))
    steering = steering_of(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    optimiser = torch.optim.SGD(steering.parameters(), lr=0.1)
    kept, trained = [own.clone() for own in steering.parameters()], [own.requires_grad for own in model.parameters()]
    report = verify(model, inputs)
    assert report.holds, str(report)
    assert set(unshown(report)) == (set() if repeats_pictures("llava") else {"beams"})
    assert all(torch.equal(own, before) for own, before in zip(steering.parameters(), kept, strict=True))
    assert [id(own) for own in optimiser.param_groups[0]["params"]] == [id(own) for own in steering_of(model).parameters()]
    assert [own.requires_grad for own in model.parameters()] == trained
    unpatch_model(model)
    assert all(own.requires_grad for own in model.parameters())


def test_what_is_said_around_the_call_steers_a_patched_model():
    model, inputs = case_of("qwen2")
    patch_model(model, steer("qwen2", normalize="none"))
    silent = torch.zeros(inputs["input_ids"].shape)
    with use_saliency(model, Saliency.from_tokens(silent)):
        report = verify(model, inputs, only=["receipt"])
    assert not report.holds, "nothing was said"
    with use_saliency(model, gaze("qwen2", inputs)):
        assert verify(model, inputs, only=["receipt"]).holds
    assert verify(model, inputs, saliency=gaze("qwen2", inputs, seed=3), only=["receipt"]).holds


def test_a_scope_is_verified_as_far_as_it_goes():
    model, inputs = case_of("qwen2")
    report = verify(model, inputs, config=steer("qwen2", queries="generated"))
    assert report.holds, str(report)
    assert set(unshown(report)) == {"aligners"}
    gated = dataclasses.replace(steer("qwen2").attention, gate="entropy")
    report = verify(model, inputs, config=gated)
    assert report.holds, str(report)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl", "llava"])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("config", [None, {"queries": "generated"}, {"gate": "entropy"}, {"normalize": "minmax"}], ids=str)
def test_it_takes_no_more_passes_than_it_says(family, patched, config):
    model, inputs = case_of(family)
    counted = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(lambda *_: counted.append(None))
    asked = None if config is None else steer(family, **config)
    if patched:
        patch_model(model, asked or steer(family))
    report = verify(model, inputs, config=None if patched else asked)
    assert report.holds, str(report)
    assert report.passes == len(counted)
    assert report.passes <= report.budget == BUDGET


def test_short_prompts_are_a_few_tokens():
    """What a model of 7 billion parameters computes in 27 passes over so many tokens is about 10 teraflop."""
    report = verify(make_model("qwen2"))
    assert report.holds
    assert report.passes <= 27
    assert report.tokens <= 720


def test_nothing_of_the_models_size_is_made(monkeypatch):
    model, inputs = case_of("qwen2")
    monkeypatch.setattr(type(model), "__deepcopy__", None, raising=False)
    monkeypatch.setattr(type(model), "float", None, raising=False)
    assert verify(model, inputs).holds
    embeddings = model.get_input_embeddings().weight
    assert embeddings.grad is None


def words(texts):
    vocabulary = {word: 5 + number for number, word in enumerate(dict.fromkeys(" ".join(texts).split()))}
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 4, **vocabulary}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_without_inputs_prompts_are_made_of_the_tokenizers_words_or_of_random_ones():
    from hf_steer.verify.prompts import LENGTHS, TEXTS

    model, seen = make_model("qwen2"), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    assert verify(model, tokenizer=words(TEXTS), only=["identity"]).holds
    (rows, tokens) = seen[0].shape
    assert (rows, tokens) == (2, max(len(text.split()) for text in TEXTS))
    seen.clear()
    assert verify(model, only=["identity"]).holds
    assert seen[0].shape == (2, max(LENGTHS))
    assert bool(((seen[0] >= 96 // 4) & (seen[0] < 3 * 96 // 4)).all())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("reached", [1, 5, 14, 24])
def test_the_model_and_the_random_numbers_are_afterwards_as_before(error, patched, reached):
    model, inputs = case_of("qwen2")
    model.generate(**inputs, max_new_tokens=1)
    model.model.layers[1].train()
    model.model.embed_tokens.weight.requires_grad_(False)
    if patched:
        patch_model(model, steer("qwen2"))
        said = gaze("qwen2", inputs)
        with use_saliency(model, said):
            expected = logits(model, inputs)
    passes = []

    def fail(*_):
        passes.append(None)
        if error is not None and len(passes) == reached:
            raise error("on purpose")

    hook = model.lm_head.register_forward_pre_hook(fail)
    before = state_of(model)
    torch.manual_seed(5)
    numbers = torch.rand(3)
    torch.manual_seed(5)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            verify(model, inputs)
    elif error is RuntimeError and reached == 1:  # the plain model itself fails
        with pytest.raises(ConfigError, match=r"itself fails on these inputs, unsteered \(RuntimeError: on purpose\)"):
            verify(model, inputs)
    else:
        verify(model, inputs)
    assert len(passes) >= reached
    assert torch.equal(torch.rand(3), numbers)
    assert changes_between(before, state_of(model)) == []
    hook.remove()
    assert get_steer_status(model).patched == patched
    if patched:
        with use_saliency(model, said):
            assert torch.equal(logits(model, inputs), expected)


def test_what_cannot_be_verified_is_refused_before_anything_is_touched():
    model, inputs = case_of("qwen2")
    before = state_of(model)
    with pytest.raises(ConfigError, match="no promise 'recipt' .did you mean 'receipt'"):
        verify(model, inputs, only=["recipt"])
    with pytest.raises(ConfigError, match=r"input_ids is \(3, 24\), attention_mask \(3, 23\)"):
        verify(model, {**inputs, "attention_mask": inputs["attention_mask"][:, 1:]})
    with pytest.raises(ConfigError, match="a mapping; got Tensor"):
        verify(model, inputs["input_ids"])
    with pytest.raises(ConfigError, match=r"must be \(rows, tokens\); got \(24,\)"):
        verify(model, {"input_ids": inputs["input_ids"][0]})
    with pytest.raises(SaliencyError, match=r"has shape \(3, 4\); the prompt needs \(3, 24\)"):
        verify(model, inputs, saliency=Saliency.from_tokens(torch.ones(3, 4)))
    with pytest.raises(ConfigError, match="asks for nothing, neither attention nor aligners"):
        verify(model, inputs, config=SteerConfig(attention=None))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(PatchError, match="nothing in this 'mamba' model that hf_steer could steer.*MambaModel has no attention"):
        verify(mamba)
    with pytest.raises(PatchError, match="PreTrainedModel; got Linear"):
        verify(torch.nn.Linear(2, 2))
    assert changes_between(before, state_of(model)) == []


def test_a_patch_that_asks_for_nothing_is_refused_with_the_reason():
    model, inputs = case_of("qwen2")
    patch_model(model, SteerConfig(attention=None))
    with pytest.raises(PatchError, match="would do nothing here: its configuration has neither attention nor aligners"):
        verify(model, inputs)
    unpatch_model(model)
    patch_model(model, steer("qwen2", strength=0.0))
    with pytest.raises(PatchError, match="would do nothing here: all strengths are 0"):
        verify(model, inputs)
    unpatch_model(model)
    patch_model(model, steer("qwen2"))
    with disable_steering(model), pytest.raises(PatchError, match="it is off in this thread"):
        verify(model, inputs)
    with pytest.raises(ConfigError, match="patched already, and its own patch is what is verified"):
        verify(model, inputs, config=steer("qwen2"))
    with pytest.raises(SaliencyError, match=r"has shape \(3, 4\)"):
        verify(model, inputs, saliency=Saliency.from_tokens(torch.ones(3, 4)))
    assert get_steer_status(model).patched


def test_a_report_can_be_read_and_written():
    model, inputs = case_of("qwen2")
    report = verify(model, inputs, only=["undone", "identity", "aligners"])
    lines = str(report).splitlines()
    assert lines[0].startswith("Qwen2ForCausalLM: qwen2, sdpa, float32 on cpu; a patch made for this; torch ")
    assert lines[1] == "  holds      identity  with strengths of 0 outputs are bit-equal  error 0, at most 0"
    assert lines[2] == "  not shown  aligners  fresh aligners leave outputs bit-equal  (the model has no encoder)"
    assert lines[4].startswith(f"{report.passes} passes (at most {BUDGET}), {report.tokens} tokens, ")
    assert lines[5] == (
        "All that could be shown holds for hf_steer on this model: 2 of 3 promises; the table says why not the others."
    )
    told = json.loads(json.dumps(report.to_dict()))
    assert told["holds"] is True
    assert told["checks"][0] == {
        "name": "identity", "says": PROMISES["identity"].says, "passed": True, "error": 0.0, "bar": 0.0, "why": "",
    }  # fmt: skip
    report.raise_if_broken()
    nothing = dataclasses.replace(report, checks=report.unshown)
    assert not nothing.holds
    with pytest.raises(ContractError, match="Nothing could be shown of hf_steer on this model"):
        nothing.raise_if_broken()
    assert dataclasses.replace(report, checks=report.checks[:1]).verdict == "All 1 promises hold for hf_steer on this model."
