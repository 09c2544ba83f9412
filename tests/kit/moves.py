"""How often control passes from one file of the package to another: what a reader has to follow, counted.

`python -m kit.moves` from `tests/` prints the files and moves of one forward pass with a box and of `generate` with two tokens.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from kit.tiny import make_model, make_prompt

import hf_steer
from hf_steer import AttentionConfig, Saliency, SaliencyConfig, patch_model

ROOT = str(Path(hf_steer.__file__).parent)


def files_of(call: Callable[[], object]) -> list[str]:
    """The files whose functions a call runs, in order; one that goes on within its own file counts once."""
    files: list[str] = []

    def note(frame, event, _):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(ROOT) and (not files or files[-1] != name):
            files.append(name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [name[len(ROOT) + 1 :] for name in files]


def steered_calls() -> dict[str, list[str]]:
    """Files of a forward pass, and of a generation of two tokens, both with a box on a picture; each has run once before."""
    told = SaliencyConfig(source=None, preserve_mass=False)
    model = patch_model(make_model("qwen2_vl"), AttentionConfig(strength=3.0, saliency=told))
    inputs = make_prompt("qwen2_vl", [[3, ("image", 2, 3), 4]])
    box = Saliency.from_boxes([(0, 0, 8, 8)], image_size=(24, 16))
    calls = {
        "forward": lambda: model(**inputs, saliency=box),
        "generate": lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False, saliency=box),
    }
    found = {}
    with torch.no_grad():
        for name, call in calls.items():
            call()
            found[name] = files_of(call)
    return found


if __name__ == "__main__":
    for name, files in steered_calls().items():
        often = ", ".join(f"{file} {count}" for file, count in Counter(files).most_common(8))
        print(f"{name}: {len(set(files))} files, {len(files) - 1} moves; most often {often}")
