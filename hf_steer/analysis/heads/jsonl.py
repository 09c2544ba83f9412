"""Examples from a file: one JSON object per line, about a text, a picture or a sound."""

from __future__ import annotations

import os
from typing import Any

from hf_steer.analysis.asked import read_asked
from hf_steer.analysis.heads.examples import HeadExample


def read_jsonl(path: str | os.PathLike[str], processor: Any, *, model: Any = None) -> list[HeadExample]:
    """Read examples and put them through a model's processor.

    Args:
        path: of the file. A line is about a picture: `image` (a path, from the file's own folder), `question`, `box` (left, top,
            right, bottom, in pixels of that picture as people see it), and optionally `unit` (what the box is counted in instead:
            `"fraction"` or `"thousandths"`, as in `Saliency.from_boxes`). About a text: `prompt` or `messages`, and `look`, words
            of it or a range of characters. Or about a sound: `audio` (a WAV file), `seconds` and optionally `question`. Each may
            have an `answer` (its first token counts) and a `thought` (what the model has said before its answer).
        processor: the model's processor, or its tokenizer.
        model: for a decoder that reads an encoder by cross-attention.

    Raises:
        FileError: a line that is no such object, or a picture or sound that cannot be read; the line is named.
        SaliencyError: a box that misses its picture, words that are not in the prompt.
    """
    asked = read_asked(path, processor, model=model)
    return [HeadExample(own.inputs, own.said, answer=own.answer_token, among=own.among) for own in asked]
