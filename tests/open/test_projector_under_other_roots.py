"""Aligners behind the projector, when the call does not come through the root that was patched."""

from __future__ import annotations

import inspect

import pytest
import torch
from kit.asking import logits, right_or_refused
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model, modality_of

from hf_steer import AlignerConfig, SteerConfig, disable_steering, patch_model

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "qwen2_audio")
KINDS = ("simple", "cross_modal_adapter")
TELLING = r"projector|input_ids"
every = pytest.mark.parametrize("family", FAMILIES)
kinds = pytest.mark.parametrize("kind", KINDS)


def aligned(family, kind, *, fresh=False):
    options = {"hidden_dim": 16, "num_heads": 4} if kind == "cross_modal_adapter" else {}
    config = AlignerConfig(modality=modality_of(family), placement="projector", kind=kind, **options)
    model = patch_model(make_encoder_model(family), SteerConfig(aligners=(config,)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in () if fresh else model.hf_steer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def off(model, act):
    with torch.no_grad(), disable_steering(model):
        return act()


@torch.no_grad()
def by_base(model, inputs):
    """The base model, and the head by hand."""
    names = inspect.signature(inspect.unwrap(model.base_model.forward)).parameters
    return model.lm_head(model.base_model(**{name: value for name, value in inputs.items() if name in names}).last_hidden_state)


def embeddings(model, inputs):
    """What the decoder gets, unsteered: words and perceived features."""
    seen = []

    def keep(module, args, kwargs):
        seen.append({name: value for name, value in kwargs.items() if name in ("inputs_embeds", "attention_mask", "position_ids")})

    hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    off(model, lambda: model(**inputs, use_cache=False))
    hook.remove()
    return seen[0]


@torch.no_grad()
def by_decoder(model, inputs, embeds):
    """The language model alone, with the embeddings of the prompt."""
    decoder = model.get_decoder()
    hidden = decoder(inputs_embeds=embeds["inputs_embeds"], attention_mask=inputs["attention_mask"],
                     position_ids=embeds.get("position_ids"), use_cache=False).last_hidden_state  # fmt: skip
    return model.lm_head(hidden)


@every
@kinds
def test_the_base_models_own_call_is_aligned_or_refused(family, kind):
    model, inputs = aligned(family, kind), make_encoder_inputs(family)
    right_or_refused(
        lambda: by_base(model, inputs), logits(model, inputs), TELLING, unlike=off(model, lambda: by_base(model, inputs))
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_audio"])  # the others add more than embeddings
@kinds
def test_the_language_models_own_call_is_aligned_or_refused(family, kind):
    model, inputs = aligned(family, kind), make_encoder_inputs(family)
    embeds = embeddings(model, inputs)
    right_or_refused(
        lambda: by_decoder(model, inputs, embeds), logits(model, inputs), TELLING,
        unlike=off(model, lambda: by_decoder(model, inputs, embeds)),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "qwen2_audio"])
@kinds
def test_embeddings_alone_are_aligned_or_refused(family, kind):
    model, inputs = aligned(family, kind), make_encoder_inputs(family)
    embeds = {"inputs_embeds": embeddings(model, inputs)["inputs_embeds"], "attention_mask": inputs["attention_mask"]}
    right_or_refused(
        lambda: logits(model, embeds), logits(model, inputs), TELLING, unlike=off(model, lambda: logits(model, embeds))
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_audio"])
@kinds
def test_ids_beside_embeddings_are_aligned_or_refused(family, kind):
    """Where a model takes both, the ids say where pictures and sounds are."""
    model, inputs = aligned(family, kind), make_encoder_inputs(family)
    both = {**embeddings(model, inputs), "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    both.pop("position_ids", None)
    if family == "llava":  # takes one of them only
        with pytest.raises(ValueError, match="exactly one"):
            logits(model, both)
        return
    plain = off(model, lambda: logits(model, both))
    right_or_refused(lambda: logits(model, both), logits(model, inputs), TELLING, unlike=plain)


@every
@kinds
def test_a_fresh_aligner_never_refuses(family, kind):
    """It changes nothing, so nothing can be lost."""
    model, inputs = aligned(family, kind, fresh=True), make_encoder_inputs(family)
    assert torch.equal(by_base(model, inputs), off(model, lambda: by_base(model, inputs)))
    if family not in ("llava", "qwen2_audio"):
        return
    embeds = embeddings(model, inputs)
    assert torch.equal(by_decoder(model, inputs, embeds), off(model, lambda: by_decoder(model, inputs, embeds)))
    alone = {"inputs_embeds": embeds["inputs_embeds"], "attention_mask": inputs["attention_mask"]}
    assert torch.equal(logits(model, alone), off(model, lambda: logits(model, alone)))


@every
@kinds
def test_text_alone_is_never_refused(family, kind):
    """Nothing is perceived, so there is nothing to align, wherever the call comes in."""
    model = aligned(family, kind)
    inputs = {"input_ids": torch.randint(2, 80, (1, 6)), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    assert torch.equal(logits(model, inputs), off(model, lambda: logits(model, inputs)))
    assert torch.equal(by_base(model, inputs), off(model, lambda: by_base(model, inputs)))
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (1, 9)
