"""What a model looks at in one picture, by every source, drawn over it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_steer.config import SaliencyConfig
from hf_steer.embedded import embedded_model_dir
from hf_steer.errors import ConfigError
from hf_steer.files import write_whole
from hf_steer.ground.arguments import Given
from hf_steer.io import model_class_of, read_base_config, read_base_model
from hf_steer.patching import read_saliency
from hf_steer.provider import SaliencyProvider
from hf_steer.registry import SOURCES
from hf_steer.saliency import Saliency, open_upright


@dataclass(frozen=True)
class Overlays:
    """What `hf-steer saliency` prints.

    Attributes:
        model: whose gaze it is.
        maps: source -> `(height, width)` raw scores over the whole picture.
        peaks: source -> `(x, y)` of the largest score, in pixels of the picture.
        files: what was written.
    """

    model: str
    maps: Mapping[str, Tensor]
    peaks: Mapping[str, tuple[float, float]]
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        maps = {name: own.tolist() for name, own in self.maps.items()}
        return {"model": self.model, "maps": maps, "peaks": dict(self.peaks), "files": list(self.files)}

    def __str__(self) -> str:
        lines = [f"{self.model} looks at", "", f"{'source':<20}{'most at (x, y)':<20}{'map':<12}{'peak (z)':>10}"]
        for name, own in self.maps.items():
            x, y = self.peaks[name]
            spread = float(own.std(unbiased=False))
            contrast = float(own.max() - own.mean()) / spread if spread > 0 else 0.0
            height, width = own.shape
            lines.append(f"{name:<20}{f'({x:.0f}, {y:.0f})':<20}{f'{height} x {width}':<12}{contrast:>10.2f}")
        return "\n".join([*lines, "", *(f"Written: {path}" for path in self.files)])


def draw_sources(
    image: str | os.PathLike[str],
    *,
    model: str | None,
    prompt: str,
    sources: Sequence[str] | None,
    blocks: str | None,
    heads: Mapping[Any, Any] | None,
    answer: str | None,
    provider: str | None,
    output: Path,
) -> Overlays:
    """Read every source's map of one picture, and draw them beside it.

    Args:
        image: path of the picture.
        model: folder or Hub repository; the embedded one when None.
        prompt: question about the picture.
        sources: names; all when None.
        blocks: of the tower, `"0,1"` or `"all"`.
        heads: `{layer: heads}` of the decoder, for `"decoder_attention"`.
        answer: text whose first token is the gradient's answer.
        provider: a Qwen-VL model whose eyes are drawn, too.
        output: folder for `saliency.png` and `saliency.json`.

    Raises:
        FileError: a picture or model that cannot be read.
        ConfigError: an unknown source, or blocks, heads or an answer that do not fit the model.
    """
    from transformers import AutoProcessor

    from hf_steer.analysis.plots.overlays import plot_overlays

    wanted = tuple(sources or SOURCES)
    for name in wanted:
        SOURCES.find(name, "--sources must be some of {known}; got {got}{near}.")
    picture = open_upright(image).convert("RGB")
    folder = str(embedded_model_dir() if model is None else model)
    live, processor = _load(folder), AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer_token = None
    if answer is not None:
        ids = Given(processor.tokenizer(answer, add_special_tokens=False)).ids
        if not ids:
            raise ConfigError(f"--answer {answer!r} has no tokens in this model's vocabulary.")
        answer_token = int(ids[0])
    maps: dict[str, Tensor] = {}
    for name in wanted:
        config = _config(name, blocks, heads, answer_token)
        maps[name] = read_saliency(live, inputs, saliency=config).maps(sizes={(0, 0): picture.size})["image", 0, 0][0]
    if provider is not None:
        eyes = SaliencyProvider(_load(provider), AutoProcessor.from_pretrained(provider))
        outside = read_saliency(live, inputs, given=Saliency.external(eyes, messages))
        maps["external"] = outside.maps(sizes={(0, 0): picture.size})["image", 0, 0][0]
    drawing = plot_overlays(picture, maps, output / "saliency.png", title=f"{folder}: {prompt}")
    peaks = {name: _peak(own, picture.size) for name, own in maps.items()}
    table = output / "saliency.json"
    found = Overlays(folder, maps, peaks, (str(drawing), str(table)))
    write_whole(table, (json.dumps(found.to_dict()) + "\n").encode())
    return found


def _load(folder: str) -> Any:
    return read_base_model(model_class_of(read_base_config(folder)), folder).eval()


def _config(name: str, blocks: str | None, heads: Mapping[Any, Any] | None, answer_token: int | None) -> SaliencyConfig:
    row = SOURCES[name]
    if row.eyes is not None and blocks is not None:
        try:
            chosen: Any = "all" if blocks == "all" else tuple(int(part) for part in blocks.split(","))
        except ValueError as error:
            raise ConfigError(f"--blocks must be whole numbers with commas between them, or all; got {blocks!r}.") from error
        return SaliencyConfig(source=name, blocks=chosen)
    own = {"source_heads": "all" if heads is None else heads, "answer_token": answer_token}
    return SaliencyConfig(source=name, **{option: value for option, value in own.items() if option in row.options})  # type: ignore[arg-type]


def _peak(scores: Tensor, size: tuple[int, int]) -> tuple[float, float]:
    """Middle of the largest score's place, in pixels."""
    height, width = scores.shape
    row, column = np.unravel_index(int(torch.argmax(scores)), (height, width))
    return (float(column) + 0.5) * size[0] / width, (float(row) + 0.5) * size[1] / height
