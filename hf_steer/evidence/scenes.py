"""Examples for the embedded model: questions about grids of digits, and the cell to look at."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hf_steer.analysis.heads.examples import HeadExample
from hf_steer.evidence.digits import PLACE_QUESTIONS, PLACES, load_digits, sample_scenes
from hf_steer.evidence.pointing import Pointing
from hf_steer.ground.arguments import Given, named
from hf_steer.saliency import Saliency


def digit_examples(
    folder: str | os.PathLike[str], part: str, count: int, *, seed: int, asked: bool = False, shuffled: bool = False
) -> list[HeadExample]:
    """Pictures of four digits, the span on one of them, after what the model says unsteered.

    Args:
        folder: of a model in the manner of the embedded one.
        part: `"training"` or `"held-out"` digits.
        count: of examples.
        seed: of pictures, cells and questions.
        asked: the question names the cell, and the query is the token before the thought names the digit there; no answer, since
            the attention says it all. Otherwise the question is open, the whole thought comes before the query, and the
            answer is the digit in the span, to which nothing but steering points.
        shuffled: the span lies on a cell drawn apart from the question's and the answer's, a control: nothing can be found then.
    """
    pointing = Pointing(folder, sample_scenes(load_digits(part), count, seed=seed), seed=seed)
    if asked:
        pointing.questions = [
            PLACE_QUESTIONS[number % len(PLACE_QUESTIONS)].format(place=PLACES[2, 2][cell])
            for number, cell in enumerate(pointing.cells)
        ]
    said = pointing.answers("nothing", 0.0)
    examples = []
    for batch in pointing.batches("examples"):
        given = Given(pointing.inputs(batch))
        pixels = given.image_pixels.split(given.image_grids.prod(1).tolist())
        for row, number in enumerate(batch):
            real = given.mask[row].bool()
            before = _before_digit(pointing, said[number]) if asked else _thought(pointing, said[number])
            ids = torch.cat([given.ids[row : row + 1, real], before], 1)
            kinds = torch.cat([given.token_kinds[row : row + 1, real], torch.zeros_like(before)], 1)
            scene, cell = pointing.scenes[number], pointing.cells[number]
            place = pointing.shuffled_cells[number] if shuffled else cell
            examples.append(
                HeadExample(
                    named(
                        ids=ids,
                        mask=torch.ones_like(ids),
                        token_kinds=kinds,
                        image_pixels=pixels[row],
                        image_grids=given.image_grids[row : row + 1],
                    ),
                    Saliency.from_boxes(scene.boxes[place], scene.image),
                    answer=None if asked else pointing.digit_ids[scene.labels[cell]],
                )
            )
    return examples


def _thought(pointing: Pointing, said: str) -> Tensor:
    """`(1, tokens)` up to the answer."""
    return _tokens(pointing, said[: said.rfind("</think>")] + "</think>\n\n")


def _before_digit(pointing: Pointing, said: str) -> Tensor:
    """`(1, tokens)` up to the first digit that is named."""
    tokens = _tokens(pointing, said)
    digits = torch.isin(tokens[0], torch.tensor(pointing.digit_ids)).nonzero().flatten().tolist()
    return tokens[:, : digits[0]] if digits else tokens


def _tokens(pointing: Pointing, text: str) -> Tensor:
    written = Given(pointing.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt"))
    return written.ids  # type: ignore[no-any-return]
