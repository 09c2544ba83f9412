"""Aligners in training: gradients, the balance of their routers, what is frozen, and projectors that learn along."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kit.aligning import TOLERANCE, align, aligned, every, logits
from kit.tiny import make_model
from kit.tiny_encoders import LISTENING, PLACEHOLDER, labels_for, make_encoder_inputs, make_encoder_model

import hf_steer
from hf_steer import AlignerError, ConfigError, PatchError, SteerConfig, patch_model
from hf_steer.aligners import SteerMoEAligner


@every
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_aligner_gets_gradients_and_the_base_none(family, placement, kind, checkpointing):
    model = aligned(family, placement, kind).train()
    if checkpointing:
        # the newer name warns not, the older one is there in 5.14
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    inputs = make_encoder_inputs(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels_for(family, inputs)).loss
        loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.hf_steer.parameters())
        assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("hf_steer."))
        optimizer.step()
        losses.append(loss.item())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("hf_steer."), name
    if checkpointing:
        model = aligned(family, placement, kind).train()
        again = model(**inputs, labels=labels_for(family, inputs)).loss.item()
        assert losses[0] == pytest.approx(again, rel=1e-5)


@pytest.mark.parametrize("family", ["whisper", "llava", "qwen2_audio", "wav2vec2"])
def test_the_load_balancing_loss_joins_the_loss_in_training_alone(family):
    model = aligned(family, "output", "simple", load_balancing_weight=0.5)
    inputs = make_encoder_inputs(family)
    labels = labels_for(family, inputs)
    silent = aligned(family, "output", "simple", load_balancing_weight=0.0)
    plain = silent.train()(**inputs, labels=labels).loss
    joined = model.train()(**inputs, labels=labels).loss
    assert 0.5 <= (joined - plain).item() <= 0.5 * 8
    as_tuple = model(**inputs, labels=labels, return_dict=False)[0]
    torch.testing.assert_close(as_tuple, joined)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, labels=labels).loss, plain)
    torch.testing.assert_close(model.eval()(**inputs, labels=labels).loss, plain)


@pytest.mark.parametrize("family", ["voxtral", "llava"])
def test_accumulated_steps_add_up_to_one(family):
    """Trainer divides by the items of the whole step; so does the load-balancing loss."""
    model = aligned(family, "output", "simple", load_balancing_weight=0.5).train()
    inputs = make_encoder_inputs(family)
    labels = labels_for(family, inputs)
    items = (labels[:, 1:] != -100).sum()
    whole_step = model(**inputs, labels=labels, num_items_in_batch=items).loss
    torch.testing.assert_close(whole_step, model(**inputs, labels=labels).loss)
    half = model(**inputs, labels=labels, num_items_in_batch=2 * items).loss
    torch.testing.assert_close(half, whole_step / 2)


def test_a_pass_that_is_interrupted_is_forgotten():
    """Python runs no hook on KeyboardInterrupt, not even those that always run."""
    model = aligned("llava", "output", "simple").train()
    inputs = make_encoder_inputs("llava")

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, labels=labels_for("llava", inputs))
    handle.remove()
    expected = logits(aligned("llava", "output", "simple"), inputs)
    assert torch.equal(model.eval()(**inputs).logits, expected)
    assert torch.isfinite(model(**inputs, labels=labels_for("llava", inputs)).loss)


def test_text_alone_trains_with_zeros():
    config = dataclasses.replace(align("llava", "output", "simple"), train_projector=True)
    model = patch_model(make_encoder_model("llava"), config)
    inputs = {name: value for name, value in make_encoder_inputs("llava").items() if name in ("input_ids", "attention_mask")}
    inputs = {name: value[2:, -6:] for name, value in inputs.items()}
    with torch.no_grad():
        plain = model(**inputs, labels=labels_for("llava", inputs)).loss
    loss = model.train()(**inputs, labels=labels_for("llava", inputs)).loss
    assert torch.equal(loss.detach(), plain)
    loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["cross_modal_adapter", "modality_specific"])
def test_training_never_shows_the_answer_to_an_aligner_that_reads_text(kind):
    model = aligned("llava", "projector", kind).train()
    inputs = make_encoder_inputs("llava")
    with pytest.raises(AlignerError, match="needs labels in training.*label smoothing"):
        model(**inputs)
    with pytest.raises(AlignerError, match="label the answer alone.*-100"):
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == PLACEHOLDER, 5))
    assert torch.isfinite(model.eval()(**inputs).logits).all()


def test_one_expert_of_many_keeps_its_probability_so_that_the_router_learns():
    module = SteerMoEAligner(16, 8, top_k=1, init="normal", init_scale=1.0)
    features = torch.randn(40, 16)
    steered, routing = module(features, return_routing=True)
    chosen = routing.probabilities["experts"].max(-1)
    torch.testing.assert_close(routing.scores["experts"].sum(-1), chosen.values)
    torch.testing.assert_close(steered, features + chosen.values[:, None] * module.steering_vectors[chosen.indices])
    steered.pow(2).sum().backward()
    assert module.router.weight.grad.abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it itself
def test_compiled_training_has_the_same_loss_and_gradients():
    model = aligned("llava", "output", "simple", load_balancing_weight=0.5).train()
    inputs = make_encoder_inputs("llava", padding="right")
    labels = labels_for("llava", inputs)
    results = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = call(**inputs, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), [parameter.grad.clone() for parameter in model.hf_steer.parameters()]))
    torch.testing.assert_close(results[0], results[1], **TOLERANCE)


def test_freezing_needs_something_that_is_left_to_train():
    model = make_model("llama")
    config = SteerConfig(attention=hf_steer.AttentionConfig(saliency=hf_steer.SaliencyConfig(source=None)))
    with pytest.raises(ConfigError, match="freeze_base=True would leave nothing to train"):
        patch_model(model, config, freeze_base=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    patch_model(model, config)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_base_trains_along_when_it_is_not_frozen():
    model = patch_model(make_encoder_model("llava"), align("llava", "output", "simple"), freeze_base=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_with_nothing_trainable_is_refused():
    model = aligned("llava", "output", "simple").train()
    model.hf_steer.requires_grad_(False)
    inputs = make_encoder_inputs("llava")
    with pytest.raises(PatchError, match="there is nothing to train.*train_steering"):
        model(**inputs, labels=labels_for("llava", inputs))


def test_train_projector_needs_one():
    with pytest.raises(ConfigError, match="train_projector=True, but 'whisper' has no projector"):
        patch_model(make_encoder_model("whisper"), SteerConfig(train_projector=True))


@pytest.mark.parametrize("family", LISTENING[1:3])
def test_a_trained_projector_is_saved_with_the_steering(family, tmp_path):
    model = patch_model(make_encoder_model(family), SteerConfig(train_projector=True))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("multi_modal_projector" in name for name in trained)
    with torch.no_grad():
        for parameter in model.hf_steer.plan.projectors[0].parameters():
            parameter.add_(1.0)
    inputs = make_encoder_inputs(family)
    hf_steer.save_steering(model, tmp_path)
    fresh = patch_model(make_encoder_model(family), SteerConfig.from_pretrained(tmp_path))
    assert not torch.equal(logits(fresh, inputs), logits(model, inputs))
    hf_steer.load_steering(fresh, tmp_path)
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))
