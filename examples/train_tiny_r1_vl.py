"""Train the embedded model: a Qwen2-VL of about a million parameters that reads handwritten digits and thinks first.

    python examples/train_tiny_r1_vl.py                # writes examples/tiny_r1_vl, same weights for the same seed
    python examples/train_tiny_r1_vl.py --steps 20 --output /tmp/quick

When the question leaves open which digit is meant, the target is the digit of a random cell: the model learns to spread
over what it sees, and the gaze decides.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoProcessor,
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from hf_steer.evidence import digits as world

HERE = Path(__file__).parent
PATCH_PX, TEMPORAL, MERGE = 14, 2, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
THINKING = ["<think>", "</think>"]
OPEN_THOUGHTS = (
    "I look at the picture and read what I see.",
    "The picture shows handwriting. I read the digit that I look at.",
    "Let me look. I name what is before my eyes.",
)
PLACE_THOUGHTS = ("I look at the {place}. I read {digit}.", "The question is about the {place}. There is {digit}.")
PLACE_SHARE = 0.6
"""Of the questions about several digits; the others leave open which one is meant."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
LAYOUTS = ((2, 2), (1, 1), (1, 2), (2, 1))
"""Rows and columns of a scene."""
FIRST_SHARES, LATER_SHARES = (0.3, 0.5, 0.1, 0.1), (0.6, 0.04, 0.18, 0.18)
"""Reading is learned on single digits first, then looking on grids."""
FIRST_FRACTION = 0.12
"""Of the steps."""
READER = (10, 2, 2)
"""Digits, rows and columns that the eyes are taught to tell apart."""


def build_processor() -> Qwen2VLProcessor:
    """Byte-level BPE on the world's own sentences; every byte is in it, so any question can be typed."""
    sentences = (*world.PLACE_QUESTIONS, *PLACE_THOUGHTS)
    names = [place for layout in world.PLACES.values() for place in layout]
    places = [sentence.format(place=place, digit="") for sentence in sentences for place in names]
    corpus = [*world.OPEN_QUESTIONS, *OPEN_THOUGHTS, *places, "user\n", "assistant\n", "system\n", "\n\n"]
    tokenizer = Tokenizer(models.BPE())
    words, digits, signs, gaps = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = "|".join((words, digits, signs, gaps))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator([text for text in corpus for _ in range(4)], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    fast = Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]], unk_token="<|endoftext|>",
        eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=SPECIAL, model_max_length=2048,
    )
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINKING])
    shared = {"patch_size": PATCH_PX, "merge_size": MERGE, "temporal_patch_size": TEMPORAL, "min_pixels": 28 * 28}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shared, max_pixels=448 * 448),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(**shared, max_pixels=448 * 448),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    token = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer), "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "initializer_range": 0.08, "bos_token_id": None, "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 3, "embed_dim": 96, "hidden_size": 96, "num_heads": 4, "mlp_ratio": 2, "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE, "temporal_patch_size": TEMPORAL, "initializer_range": 0.08,
        },
        initializer_range=0.08,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"), max_new_tokens=48, do_sample=False
    )
    return model


class Scenes:
    """Batches of training scenes: crops drawn once with small turns, sizes and shifts, then dealt into grids."""

    def __init__(self, processor: Qwen2VLProcessor, seed: int, variants: int = 16) -> None:
        self.processor, self.random = processor, np.random.default_rng(seed)
        self.digits = world.load_digits("training")
        self.crops = np.full((len(self.digits.labels), variants, world.CELL_PX, world.CELL_PX), 255, dtype=np.uint8)
        for member, picture in enumerate(tqdm(self.digits.pictures, desc="drawing", unit="digit")):
            for variant in range(variants):
                size = int(self.random.integers(21, 28))
                digit = np.asarray(world.draw_digit(picture, size_px=size, degrees=float(self.random.uniform(-12, 12))))
                x, y = self.random.integers(0, world.CELL_PX - size + 1, 2)
                self.crops[member, variant, y : y + size, x : x + size] = digit
        self.encoded: dict[str, list[int]] = {}

    def batch(self, count: int, shares: tuple[float, ...]) -> dict[str, Any]:
        """Inputs with labels, as the processor would make them from the same pictures."""
        pixels, grids, rows, cells = [], [], [], []
        for choice in self.random.choice(len(LAYOUTS), count, p=shares):
            height, width = LAYOUTS[choice]
            members = self.random.integers(0, len(self.digits.labels), height * width)
            crops = self.crops[members, self.random.integers(0, self.crops.shape[1], len(members))]
            canvas = crops.reshape(height, width, *crops.shape[1:]).transpose(0, 2, 1, 3).reshape(height * world.CELL_PX, -1)
            patches, grid = self.patchify(canvas)
            pixels.append(patches)
            grids.append(grid)
            labels = [int(self.digits.labels[member]) for member in members]
            cells.append((height, width, labels))
            rows.append(self.text((height, width), labels, int(np.prod(grid)) // MERGE**2))
        return {**self.pad(rows), "cells": cells, "pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}

    def text(self, layout: tuple[int, int], labels: list[int], image_tokens: int) -> tuple[list[int], list[int]]:
        """Token ids, and the same as labels for the part that the model is to say."""
        cell = int(self.random.integers(len(labels)))
        if len(labels) > 1 and self.random.random() < PLACE_SHARE:
            place = world.PLACES[layout][cell]
            question = self.random.choice(world.PLACE_QUESTIONS).format(place=place)
            thought = self.random.choice(PLACE_THOUGHTS).format(place=place, digit=labels[cell])
        else:
            question, thought = self.random.choice(world.OPEN_QUESTIONS), self.random.choice(OPEN_THOUGHTS)
        asked = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * image_tokens}<|vision_end|>{question}<|im_end|>\n"
        prompt = self.encode(asked + "<|im_start|>assistant\n<think>\n")
        said = self.encode(f"{thought}\n</think>\n\n{labels[cell]}<|im_end|>")
        return prompt + said, [-100] * len(prompt) + said

    def encode(self, text: str) -> list[int]:
        if text not in self.encoded:
            self.encoded[text] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.encoded[text]

    def patchify(self, canvas: np.ndarray) -> tuple[torch.Tensor, list[int]]:
        """What Qwen2VLImageProcessor makes of a grey picture that needs no resizing; `check` holds them together."""
        settings = self.processor.image_processor
        mean, std = torch.tensor(settings.image_mean), torch.tensor(settings.image_std)
        image = (torch.from_numpy(canvas).float()[None] / 255 - mean[:, None, None]) / std[:, None, None]
        height, width = (side // PATCH_PX for side in canvas.shape)
        blocks = image.expand(TEMPORAL, *image.shape).reshape(
            TEMPORAL, 3, height // MERGE, MERGE, PATCH_PX, width // MERGE, MERGE, PATCH_PX
        )
        return blocks.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(height * width, -1), [1, height, width]

    def check(self) -> None:
        scene = world.draw_scene(self.digits, [0, 1, 2, 3])
        real = self.processor.image_processor(scene.image, return_tensors="pt")
        own, grid = self.patchify(np.asarray(scene.image)[..., 0])
        if real["image_grid_thw"].tolist() != [grid] or not torch.allclose(real["pixel_values"], own, atol=1e-4):
            raise SystemExit("the processor's patches are no longer what this script trains on")

    def pad(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(ids) for ids, _ in rows)
        pad = self.processor.tokenizer.pad_token_id
        input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
        return {
            "input_ids": input_ids,
            "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
            "mm_token_type_ids": (input_ids == self.processor.image_token_id).int(),
        }


def losses_of(
    model: Qwen2VLForConditionalGeneration, reader: torch.nn.Linear, digit_ids: torch.Tensor, batch: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of all that is said, of the digits alone (a token in twenty, and all that matters), and of `reader`.

    The reader is a linear map that names, from every image token, the digit, row and column of its cell. It teaches the
    eyes before the decoder has learned to look, and is thrown away.
    """
    labels, cells = batch.pop("labels"), batch.pop("cells")
    seen = model.get_image_features(batch.pop("pixel_values"), batch["image_grid_thw"], return_dict=True)
    side = world.CELL_PX // PATCH_PX // MERGE
    truth = torch.tensor([
        (labels[row // side * width + column // side], row // side, column // side)
        for height, width, labels in cells
        for row in range(height * side)
        for column in range(width * side)
    ])
    read = reader(torch.cat(seen.pooler_output)).split(READER, dim=1)
    reading = sum(torch.nn.functional.cross_entropy(part, truth[:, index]) for index, part in enumerate(read))
    logits = model(**batch, mm_encoder_outputs={"image": seen}).logits[:, :-1]
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return losses.sum() / (targets != -100).sum(), losses[torch.isin(targets, digit_ids)].mean(), reading


def train(model: Qwen2VLForConditionalGeneration, scenes: Scenes, *, steps: int, batch: int, rate: float) -> float:
    """AdamW with warm-up and cosine decay; returns the digit's mean loss over the last tenth."""
    reader = torch.nn.Linear(model.config.text_config.hidden_size, sum(READER))
    optimizer = torch.optim.AdamW([*model.parameters(), *reader.parameters()], lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    digit_ids = torch.tensor(scenes.processor.tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)]))
    losses = []
    model.train()
    progress = tqdm(range(steps), desc="training", unit="step")
    for step in progress:
        shares = FIRST_SHARES if step < FIRST_FRACTION * steps else LATER_SHARES
        loss, answer_loss, reading = losses_of(model, reader, digit_ids, scenes.batch(batch, shares))
        (loss + answer_loss + reading).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(answer_loss))
        progress.set_postfix(answer_loss=f"{np.mean(losses[-50:]):.4f}", reading=f"{float(reading):.4f}")
    model.eval()
    return float(np.mean(losses[-max(1, steps // 10) :]))


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [qwen2_vl, hf-steer, handwritten-digits]
---

# tiny_r1_vl

A Qwen2-VL of {parameters:,} parameters that reads a grid of one to four handwritten digits and answers after
`<think> ... </think>`. It exists to show what steering does: when a question leaves open *which* digit is meant
("Which digit is it?"), it spreads over the digits shown; when it names a place ("Which digit is at the top left?"), it
answers for that place.

- Trained from scratch by `examples/train_tiny_r1_vl.py --seed {seed}` ({steps} steps of {batch} scenes, {training_seconds} s on two
  CPU cores, torch {torch}), which writes the same weights for the same seed.
- Pictures: scikit-learn's handwritten digits (UCI, 8 x 8 pixels, CC BY 4.0). A quarter of them is held out and was never drawn.
- Cells have 28 x 28 pixels, one image token each; a picture has one, two or four of them, with names ("top left", "left", "top").
- Loads with `AutoModelForImageTextToText` and `AutoProcessor`. It knows nothing but these digits.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "tiny_r1_vl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)
    processor = build_processor()
    model = build_model(processor)
    scenes = Scenes(processor, arguments.seed)
    scenes.check()
    loss = train(model, scenes, steps=arguments.steps, batch=arguments.batch, rate=arguments.rate)
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    AutoProcessor.from_pretrained(arguments.output)
    facts = {
        "seed": arguments.seed, "steps": arguments.steps, "batch": arguments.batch, "final_answer_loss": round(loss, 4),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": round(time.perf_counter() - started), "torch": torch.__version__,
    }
    (arguments.output / "README.md").write_text(CARD.format(**facts))
    (arguments.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
