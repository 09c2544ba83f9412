"""A small vision tower, trained from scratch to name what lies under each patch of a scene."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mind_scenes import SIDE_PX, Painter, Scene
from PIL import Image
from tqdm.auto import tqdm
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

PATCH_PX = 16
SINGLE_SHARE = 0.3
"""Of the scenes in training that show one thing alone."""
BATCH, RATE = 64, 1.5e-3


def sizes(*, tiny: bool) -> SiglipVisionConfig:
    """Of the tower; the decoder gets what its last layer but one says, as LLaVA's does."""
    hidden, layers = (32, 2) if tiny else (128, 5)
    return SiglipVisionConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=4, image_size=SIDE_PX,
        patch_size=PATCH_PX, vision_use_head=False,
    )  # fmt: skip


def processor_of_tower() -> SiglipImageProcessor:
    """Pixels as the tower was trained on them."""
    return SiglipImageProcessor(
        size={"height": SIDE_PX, "width": SIDE_PX}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=Image.Resampling.BILINEAR
    )


def pixels_of(scenes: Sequence[Scene]) -> torch.Tensor:
    """What the processor makes of pictures of the tower's own size."""
    return torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1


def names_of_patches(scenes: Sequence[Scene]) -> torch.Tensor:
    """The name that covers most of half a patch, -100 where none does: (scenes, patches)."""
    start = np.arange(0, SIDE_PX, PATCH_PX)
    labels = np.full((len(scenes), len(start), len(start)), -100)
    for scene, rows in zip(scenes, labels, strict=True):
        for name, (left, top, right, bottom) in zip(scene.names, scene.drawn, strict=True):
            across = np.clip(np.minimum(right, start + PATCH_PX) - np.maximum(left, start), 0, None)
            down = np.clip(np.minimum(bottom, start + PATCH_PX) - np.maximum(top, start), 0, None)
            rows[np.outer(down, across) > PATCH_PX**2 / 2] = name
    return torch.from_numpy(labels).flatten(1)


def train_tower(pictures: np.ndarray, folder: Path, *, steps: int, seed: int, tiny: bool = False) -> dict[str, float]:
    """Train it, and write it with its processor into a folder.

    Args:
        pictures: (artists, names, height, width, 4) bytes.
        folder: to write into.
        steps: of training.
        seed: of weights and scenes.
        tiny: for tests.

    Returns:
        The share of patches that are named right in single pictures and in scenes of four that were not trained on.
    """
    torch.manual_seed(seed)
    model = SiglipVisionModel(sizes(tiny=tiny))
    head = torch.nn.Linear(model.config.hidden_size, pictures.shape[1])
    painter = Painter(pictures, seed)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), desc="tower")):
        scenes = [painter.one() if painter.random.random() < SINGLE_SHARE else painter.four("training") for _ in range(BATCH)]
        labels = names_of_patches(scenes)
        seen = head(model(pixels_of(scenes)).last_hidden_state)[labels >= 0]
        loss = torch.nn.functional.cross_entropy(seen, labels[labels >= 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    model.eval().save_pretrained(folder)
    processor_of_tower().save_pretrained(folder)
    torch.save(head.state_dict(), folder / "head.pt")
    held_out = Painter(pictures, seed + 1)
    return {
        "one": patches_right(model, head, [held_out.one() for _ in range(200)]),
        "four": patches_right(model, head, [held_out.four("report") for _ in range(200)]),
    }


@torch.no_grad()
def patches_right(model: SiglipVisionModel, head: torch.nn.Linear, scenes: Sequence[Scene]) -> float:
    labels = names_of_patches(scenes)
    said = head(model(pixels_of(scenes)).last_hidden_state).argmax(-1)
    return float((said == labels)[labels >= 0].float().mean())
