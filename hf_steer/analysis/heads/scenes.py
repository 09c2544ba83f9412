"""Examples for the embedded model: open questions about grids of digits, one of them pointed at."""

from __future__ import annotations

import os

import torch

from hf_steer.analysis.digits import load_digits, sample_scenes
from hf_steer.analysis.heads.examples import HeadExample
from hf_steer.analysis.pointing import Pointing
from hf_steer.saliency import Saliency


def digit_examples(
    folder: str | os.PathLike[str], part: str, count: int, *, seed: int, shuffled: bool = False
) -> list[HeadExample]:
    """Pictures of four digits, the span on one, its digit the answer; the model's own unsteered thought comes before it.

    Args:
        folder: of a model in the manner of the embedded one.
        part: `"training"` or `"held-out"` digits.
        count: of examples.
        seed: of pictures, cells and questions.
        shuffled: the span lies on a cell drawn apart from the answer's, a control: nothing can be found then.
    """
    pointing = Pointing(folder, sample_scenes(load_digits(part), count, seed=seed), seed=seed)
    said = pointing.answers("nothing", 0.0)
    examples = []
    for batch in pointing.batches("examples"):
        inputs = pointing.inputs(batch)
        patches = inputs["image_grid_thw"].prod(1).tolist()
        pixels = inputs["pixel_values"].split(patches)
        for row, number in enumerate(batch):
            real = inputs["attention_mask"][row].bool()
            thought = said[number][: said[number].rfind("</think>")] + "</think>\n\n"
            end = pointing.processor.tokenizer(thought, add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids = torch.cat([inputs["input_ids"][row : row + 1, real], end], 1)
            types = torch.cat([inputs["mm_token_type_ids"][row : row + 1, real], torch.zeros_like(end)], 1)
            scene, cell = pointing.scenes[number], pointing.cells[number]
            looked_at = pointing.shuffled_cells[number] if shuffled else cell
            examples.append(
                HeadExample(
                    {
                        "input_ids": ids,
                        "attention_mask": torch.ones_like(ids),
                        "mm_token_type_ids": types,
                        "pixel_values": pixels[row],
                        "image_grid_thw": inputs["image_grid_thw"][row : row + 1],
                    },
                    Saliency.from_boxes(scene.boxes[looked_at], scene.image),
                    answer=pointing.digit_ids[scene.labels[cell]],
                )
            )
    return examples
