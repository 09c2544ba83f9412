"""What Trainer trains on in the tests."""

from __future__ import annotations

import torch
from kit.aligning import align
from kit.tiny_encoders import labels_for, make_encoder_inputs, make_encoder_model
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hf_steer import patch_model


class Sounds(Dataset):
    """Eight sounds for Whisper, each with its transcript."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        inputs = make_encoder_inputs("whisper", seed=index)
        item = {name: value[0] for name, value in inputs.items()}
        return {**item, "labels": labels_for("whisper", inputs)[0]}


def arguments(folder, **changed):
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 3e-2, "logging_steps": 2, "save_steps": 3,
        "report_to": "none", "seed": 0, "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**settings, **changed})


def whisper(kind="progressive", **options):
    torch.manual_seed(0)
    placement = "layers" if kind == "layer_wise" else "output"
    return patch_model(make_encoder_model("whisper"), align("whisper", placement, kind, **options))


def steering_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith("hf_steer.")}
