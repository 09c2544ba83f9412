"""PEFT's prompt and prefix tuning put tokens before the prompt that nobody typed: scores land on the words, or it is said."""

from __future__ import annotations

import peft
import pytest
import torch
from kit.asking import (
    answer_or_refusal,
    cache_name,
    generate,
    logits,
    look,
    plain_generate,
    plain_logits,
    prompt,
    right_or_refused,
    steered,
)
from kit.tiny import make_model

from hf_steer import Saliency, disable_steering

VIRTUAL = 4
TELLING = "virtual tokens"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # PEFT's own spelling, until 5.40
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]
KINDS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=8),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
}
every = pytest.mark.parametrize("kind", list(KINDS))


def tuned(model, kind):
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, KINDS[kind]()).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "prompt_encoder" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return wrapped


def generates(model, kind):
    """PEFT 0.21 says `past_key_values` where generate of transformers 5.24 says `cache`, which wins: the prefix is lost."""
    return kind != "prefix" or cache_name(model.get_base_model()) == "past_key_values"


def masked(kind, inputs, scores):
    """The same by hand: λ·s in the mask of an unpatched model, nothing on the virtual tokens."""
    model, tokens = tuned(make_model("qwen2"), kind), inputs["input_ids"].shape[1]
    bias = torch.nn.functional.pad(3.0 * scores, (VIRTUAL, 0))
    rows = tokens if kind == "prefix" else VIRTUAL + tokens
    causal = torch.ones(rows, VIRTUAL + tokens, dtype=torch.bool).tril(VIRTUAL + tokens - rows)
    mask = torch.where(causal, bias[:, None, None, :], torch.finfo(torch.float32).min)
    inner = model.get_base_model()
    inner.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True)
    return logits(model, inputs)


@every
def test_scores_of_the_prompt_land_on_its_words_or_are_refused(kind):
    inputs = prompt("qwen2")
    said = look(inputs)
    model = tuned(steered("qwen2", normalize="none"), kind)
    right_or_refused(
        lambda: logits(model, inputs, said), masked(kind, inputs, said.tokens), TELLING, unlike=plain_logits(model, inputs)
    )


@every
@pytest.mark.parametrize("how", ["block", "call"])
def test_generation_is_steered_to_its_words_or_refused(kind, how):
    """The first token is the likeliest after one steered pass."""
    inputs = prompt("qwen2")
    said = look(inputs)
    model = tuned(steered("qwen2", normalize="none"), kind)
    if not generates(model, kind):
        pytest.skip("this PEFT's prefixes do not reach the generate of this transformers")
    given = {"statement": said} if how == "block" else {"saliency": said}
    first = masked(kind, inputs, said.tokens)[:, -1].argmax(-1)
    right_or_refused(lambda: generate(model, inputs, **given)[:, -6:][:, 0], first, TELLING)


@every
def test_a_tuned_model_of_which_nothing_is_said_is_never_refused(kind):
    inputs = prompt("qwen2")
    model, bare = tuned(steered("qwen2"), kind), tuned(make_model("qwen2"), kind)
    assert torch.equal(logits(model, inputs), logits(bare, inputs))
    if not generates(model, kind):
        return
    assert torch.equal(generate(model, inputs), generate(bare, inputs))
    assert torch.equal(plain_generate(model, inputs), generate(bare, inputs))


@every
def test_the_refusal_leaves_nothing_behind(kind):
    inputs = prompt("qwen2")
    model = tuned(steered("qwen2"), kind)
    plain = plain_logits(model, inputs)
    refusal = answer_or_refusal(lambda: logits(model, inputs, Saliency.from_tokens(torch.randn(1, 9))))[1]
    assert refusal is None or TELLING in refusal
    with disable_steering(model):
        assert torch.equal(logits(model, inputs), plain)
