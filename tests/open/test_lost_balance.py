"""Trainer takes the labels away, and with them the loss that the load balancing joins: said, or it reaches the router."""

from __future__ import annotations

import pytest
import torch
from kit.asking import answer_or_refusal
from kit.tiny_encoders import labels_for, make_encoder_inputs, make_encoder_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_steer import AlignerConfig, SteerConfig, patch_model
from hf_steer.training import collect_balance

REMEDY = "load_balancing_weight"


class Sounds(Dataset):
    """Four sounds for Whisper, each with its transcript."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        inputs = make_encoder_inputs("whisper", seed=index)
        return {**{name: value[0] for name, value in inputs.items()}, "labels": labels_for("whisper", inputs)[0]}


def made(weight, family="whisper"):
    torch.manual_seed(0)
    aligner = AlignerConfig(
        modality="audio" if family == "whisper" else "image", kind="simple", init="normal", load_balancing_weight=weight
    )
    return patch_model(make_encoder_model(family), SteerConfig(aligners=(aligner,)))


def settings(folder, **changed):
    given = {
        "per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 1e-2, "report_to": "none", "seed": 0, "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False, "optim": "sgd", "max_grad_norm": 1e9,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**given, **changed})


def loss_of_ones_own(outputs, labels, num_items_in_batch=None, **kwargs):
    return torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())


WAYS = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, {}),
    "a loss of one's own": ({}, {"compute_loss_func": loss_of_ones_own}),
}
every = pytest.mark.parametrize("way", list(WAYS))


def train(model, way, folder):
    arguments, more = WAYS[way]
    Trainer(model=model, args=settings(folder, **arguments), train_dataset=Sounds(), **more).train()
    return {name: parameter.detach().clone() for name, parameter in model.hf_steer.named_parameters()}


@every
def test_a_balancing_loss_that_cannot_join_is_said_or_reaches_the_router(way, tmp_path):
    """Another weight must give another step, or an error."""
    light = train(made(0.0), way, tmp_path / "light")
    heavy, refusal = answer_or_refusal(lambda: train(made(100.0), way, tmp_path / "heavy"))
    if refusal is not None:
        assert REMEDY in refusal
        return
    assert any(not torch.allclose(heavy[name], light[name], rtol=1e-3) for name in light)


@every
def test_without_a_balancing_loss_nothing_is_lost(way, tmp_path):
    before = {name: parameter.detach().clone() for name, parameter in made(0.0).hf_steer.named_parameters()}
    after = train(made(0.0), way, tmp_path)
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_the_plain_way_trains_with_it(tmp_path):
    steps = [made(weight) for weight in (0.0, 100.0)]
    for number, model in enumerate(steps):
        Trainer(model=model, args=settings(tmp_path / str(number)), train_dataset=Sounds()).train()
    light, heavy = (dict(model.hf_steer.named_parameters()) for model in steps)
    assert any(not torch.allclose(heavy[name], light[name], rtol=1e-3) for name in light)


def test_a_loop_without_labels_is_said_or_balanced():
    model = made(100.0).train()
    inputs = make_encoder_inputs("whisper")
    loss, refusal = answer_or_refusal(lambda: loss_of_ones_own(model(**inputs), labels_for("whisper", inputs)))
    if refusal is not None:
        assert REMEDY in refusal
        return
    loss.backward()
    plain = made(0.0).train()
    loss_of_ones_own(plain(**inputs), labels_for("whisper", inputs)).backward()
    pairs = zip(model.hf_steer.named_parameters(), plain.hf_steer.named_parameters(), strict=True)
    assert any(not torch.allclose(a.grad, b.grad, rtol=1e-3) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("family", ["whisper", "llava"])
def test_evaluation_asks_for_no_balance(family):
    inputs = make_encoder_inputs(family)
    model = made(100.0, family).eval()
    model(**inputs)
    with torch.no_grad():
        model(**inputs, labels=labels_for(family, inputs))
        model.train()(**inputs)


def test_no_weight_asks_for_no_balance():
    model = made(0.0).train()
    model(**make_encoder_inputs("whisper")).logits.sum().backward()


def test_frozen_aligners_ask_for_no_balance():
    """Nothing of the router trains, so that its loss could move nothing."""
    model = made(100.0).train()
    for parameter in model.hf_steer.parameters():
        parameter.requires_grad_(False)
    model.proj_out.weight.requires_grad_(True)
    model(**make_encoder_inputs("whisper")).logits.sum().backward()


def test_the_trainers_evaluation_runs_with_smoothed_labels(tmp_path):
    arguments = settings(tmp_path, label_smoothing_factor=0.1)
    trainer = Trainer(model=made(100.0), args=arguments, train_dataset=Sounds(), eval_dataset=Sounds())
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_loss_of_ones_own_collects_it():
    """What is collected without labels is what joins the loss with them."""
    model, inputs = made(0.5, "llava").train(), make_encoder_inputs("llava")
    labels = labels_for("llava", inputs)
    plain = made(0.0, "llava").train()(**inputs, labels=labels).loss
    joined = model(**inputs, labels=labels).loss
    with collect_balance(model) as balance:
        model(**inputs)
    collected = balance.loss()
    torch.testing.assert_close(collected, joined - plain)
    assert collected > 0.1
    collected.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.hf_steer.parameters())
    assert balance.loss() == 0
