"""What `test_training.py` starts under torchrun: a short training in one process or in several, on gloo."""

from __future__ import annotations

import json
import os
import sys
import tempfile

import torch
import torch.distributed as dist
from kit.tiny_encoders import PLACEHOLDER, labels_for, make_encoder_inputs, make_encoder_model
from kit.trainers import arguments
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import Trainer

import hf_steer
from hf_steer import AlignerConfig, SteerConfig, patch_model


class Pictures(Dataset):
    """Sixteen prompts of equal length with a picture each, and a word to say about it."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(2, 80, (8,), generator=generator)
        ids = torch.cat([words[:3], torch.full((9,), PLACEHOLDER), words[3:]])
        labels = torch.full_like(ids, -100)
        labels[-2:] = words[-2:]
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
            "pixel_values": torch.randn(3, 12, 12, generator=generator),
        }  # fmt: skip


def report(**result):
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("RESULT " + json.dumps(result), flush=True)


def leave():
    """Ends the process at once: one whose destructors run while gloo's threads do is aborted now and then."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)


def train_with_ddp(batch):
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(
            folder, max_steps=4, per_device_train_batch_size=int(batch), logging_steps=1, save_strategy="no", ddp_backend="gloo",
            optim="sgd", learning_rate=0.3,
        )  # fmt: skip
        torch.manual_seed(0)
        ear = AlignerConfig(modality="image", placement="layers", kind="layer_wise", load_balancing_weight=0.1)
        model = patch_model(make_encoder_model("llava"), SteerConfig(aligners=(ear,)))
        trainer = Trainer(model=model, args=settings, train_dataset=Pictures())
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        report(losses=losses, norm=float(sum(p.double().pow(2).sum() for p in model.hf_steer.parameters())))
    leave()


def train_sharded(folder, *, shard):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    ear = AlignerConfig(modality="image", placement="layers", kind="hierarchical", load_balancing_weight=0.1)
    eye = AlignerConfig(modality="image", kind="simple", load_balancing_weight=0.1)
    model = patch_model(make_encoder_model("llava"), SteerConfig(aligners=(ear, eye), train_projector=True))
    if shard:
        for layer in model.get_decoder().layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs, losses = make_encoder_inputs("llava"), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.train()(**inputs, labels=labels_for("llava", inputs)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    hf_steer.save_steering(model, folder)
    dist.barrier()
    saved = [parameter.detach().clone() for parameter in model.hf_steer.parameters()]
    with torch.no_grad():
        for parameter in model.hf_steer.parameters():
            parameter.zero_()
    hf_steer.load_steering(model, folder)
    for own, other in zip(model.hf_steer.parameters(), saved, strict=True):
        whole = [value.full_tensor() if isinstance(value, DTensor) else value for value in (own, other)]
        assert torch.equal(*whole)
    report(losses=losses, sharded=all(isinstance(p, DTensor) for p in model.parameters()))
    leave()


if __name__ == "__main__":
    how, argument = sys.argv[1:]
    if how == "ddp":
        train_with_ddp(argument)
    else:
        train_sharded(argument, shard=how == "fsdp")
