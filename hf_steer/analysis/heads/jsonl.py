"""Examples from a file: one JSON object per line, a picture, a question, a box, an answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hf_steer.analysis.heads.examples import HeadExample
from hf_steer.analysis.prompts import messages_for
from hf_steer.errors import FileError, SaliencyError
from hf_steer.ground.arguments import Given
from hf_steer.saliency import Saliency, open_upright

REQUIRED = ("image", "question", "box")
OPTIONAL = ("answer", "thought", "unit")


def read_jsonl(path: str | os.PathLike[str], processor: Any) -> list[HeadExample]:
    """Read examples and put them through a model's processor.

    Args:
        path: of the file. A line holds `image` (a path, from the file's own folder), `question`, `box` (left, top, right,
            bottom, in pixels of that picture as people see it), and optionally `unit` (what the box is counted in instead:
            `"fraction"` or `"thousandths"`, as in `Saliency.from_boxes`), `answer` (its first token counts) and `thought` (what
            the model has said before its answer, `</think>` included).
        processor: the model's, with a chat template.

    Raises:
        FileError: a line that is no such object, or a picture that cannot be read; the line is named.
        SaliencyError: a box that misses its picture.
    """
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{source} cannot be read: {error}") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                examples.append(_example(_fields(line), source.parent, processor))
            except (FileError, SaliencyError) as error:
                raise type(error)(f"{source}, line {number}: {error}") from error
    return examples


def _fields(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise FileError(f"not JSON ({error}).") from error
    if not isinstance(values, dict) or not set(REQUIRED) <= set(values) <= {*REQUIRED, *OPTIONAL}:
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise FileError(f"a line is an object with {', '.join(REQUIRED)} and, if wanted, {', '.join(OPTIONAL)}; got {got}.")
    texts = [name for name in ("image", "question", *OPTIONAL) if not isinstance(values.get(name, ""), str)]
    if texts or values.get("answer") == "":
        raise FileError(f"{', '.join(texts) or 'answer'} must be text, and an answer not empty.")
    return values


def _example(values: dict[str, Any], folder: Path, processor: Any) -> HeadExample:
    image = open_upright(folder / values["image"]).convert("RGB")
    turn = messages_for(image, values["question"])
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + values.get("thought", "")
    inputs = dict(processor(text=[text], images=[image], return_tensors="pt"))
    answer = None
    if "answer" in values:
        before = Given(inputs).ids[0].tolist()
        whole = Given(processor(text=[text + values["answer"]], images=[image], return_tensors="pt")).ids[0].tolist()
        if whole[: len(before)] != before or len(whole) == len(before):
            raise FileError(
                f"the tokens of answer {values['answer']!r} merge with those of the prompt before it; begin it or end the thought "
                "with a space or a line break."
            )
        answer = whole[len(before)]
    return HeadExample(inputs, Saliency.from_boxes(values["box"], image, unit=values.get("unit", "pixels")), answer=answer)
