"""A model from a folder or the Hub, ready to be verified: with the steering beside it, if there is one, and prompts of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_steer.config import SteerConfig
from hf_steer.errors import ConfigError, FileError
from hf_steer.families import resolve
from hf_steer.ground.decoders import reads_encoder
from hf_steer.io import from_pretrained, model_class_of, read_base_config, read_base_model
from hf_steer.patching.scopes import find_steering
from hf_steer.verify.prompts import TEXTS, padded_rows, written

if TYPE_CHECKING:
    from PIL import Image

Place = str | os.PathLike[str]
_SIZE_PX = (160, 112)
_TONES_HZ = ((220.0, 330.0), (550.0, 275.0))
"""A second each, in two sounds of one length: some extractors pad only when told to, others to a window of their own."""


@dataclass(frozen=True)
class Loaded:
    """What `verify` takes.

    Attributes:
        model: in eval mode, on its device; patched where a steering was given, or lies beside it.
        inputs: with a picture, where the model looks at some; with a sound, where an encoder of sounds is all that it reads; else
            None, for short prompts.
        tokenizer: of the model, or its processor; None where there is none that can be read.
    """

    model: Any
    inputs: dict[str, Any] | None
    tokenizer: Any


def load_to_verify(
    id_or_dir: Place, *, config: Place | None = None, pictures: Sequence[Any] = (), prompt: str | None = None, device: str = "cpu"
) -> Loaded:
    """Load a model in the type that it was saved in.

    Args:
        id_or_dir: folder or Hub repository.
        config: folder or Hub repository of a steering; None for the one beside the model, if there is one.
        pictures: for its prompts; one is drawn where none is given and the model looks at some.
        prompt: for its prompts; texts of ours when None.
        device: where it runs.

    Raises:
        FileError: no such model or steering, or one that cannot be read.
        ConfigError: pictures for a model that looks at none, or whose processor cannot be had; a prompt for one that only listens.
        PatchError: no class of transformers that can be patched.
    """
    if config is not None or _has_steering(id_or_dir):
        model = from_pretrained(id_or_dir, steer_config=config, dtype="auto")
    else:
        model = read_base_model(model_class_of(read_base_config(id_or_dir)), id_or_dir, dtype="auto")
    model = model.to(device).eval()
    steering = find_steering(model)
    anatomy = resolve(model) if steering is None else steering.plan.anatomy
    looks = "image" in anatomy.placeholder_ids
    if pictures and not looks:
        raise ConfigError(f"{anatomy.family!r} is not known to look at pictures; leave --image out to verify it on text.")
    if "audio" in anatomy.encoders and reads_encoder(anatomy.root):
        if prompt is not None:
            raise ConfigError(f"{anatomy.family!r} listens and reads no prompt; leave --prompt out.")
        return Loaded(model, _heard(model, id_or_dir), _read(id_or_dir, "AutoTokenizer"))
    processor = _read(id_or_dir, "AutoProcessor") if looks else _read(id_or_dir, "AutoTokenizer")
    if pictures and processor is None:
        raise ConfigError(f"the processor of {os.fspath(id_or_dir)!r} cannot be read, and pictures need it.")
    if looks and processor is not None:
        return Loaded(model, _shown(model, processor, pictures or (_drawn(),), prompt), processor)
    if prompt is None:
        return Loaded(model, None, processor)
    rows = [] if processor is None else written(processor, _texts(prompt))
    if not all(rows) or not rows:
        raise ConfigError(f"there is no tokenizer at {os.fspath(id_or_dir)!r} that knows a word of the prompt; leave --prompt out.")
    return Loaded(model, padded_rows(rows, model.device), processor)


def _has_steering(id_or_dir: Place) -> bool:
    try:
        SteerConfig.from_pretrained(id_or_dir)
    except FileError:
        return False
    return True


def _read(id_or_dir: Place, kind: str) -> Any:
    """A tokenizer or processor; None where there is none, or what it needs is not installed."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(id_or_dir)
    except (OSError, ValueError, ImportError, KeyError, TypeError):
        return None


def _texts(prompt: str | None) -> tuple[str, str]:
    """Two of unequal length."""
    return TEXTS if prompt is None else (f"{TEXTS[1]} {prompt}", prompt)


def _shown(model: Any, processor: Any, pictures: Sequence[Any], prompt: str | None) -> dict[str, Any]:
    """Two prompts about pictures, as chats."""
    shown = [pictures[number % len(pictures)] for number in range(max(2, len(pictures)))]
    texts = [_texts(prompt)[number % 2] for number in range(len(shown))]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        for picture, text in zip(shown, texts, strict=True)
    ]
    try:
        written = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    except ValueError as error:
        raise ConfigError(
            f"the model's processor cannot write a chat ({error}). Make the inputs yourself: hf_steer.verify(model, inputs)."
        ) from error
    inputs = processor(text=written, images=shown, return_tensors="pt", padding=True, padding_side="left")
    return _moved(inputs, model)


def _heard(model: Any, id_or_dir: Place) -> dict[str, Any]:
    """Two sounds, as the model's own feature extractor hands them on."""
    extractor = _read(id_or_dir, "AutoFeatureExtractor")
    if extractor is None:
        raise ConfigError(
            f"the feature extractor of {os.fspath(id_or_dir)!r} cannot be read, and a model that listens needs it. Make the inputs "
            "yourself: hf_steer.verify(model, inputs)."
        )
    rate = extractor.sampling_rate
    sounds = [_sounded(rate, tones).numpy() for tones in _TONES_HZ]
    return _moved(extractor(sounds, sampling_rate=rate, return_tensors="pt"), model)


def _moved(inputs: Any, model: Any) -> dict[str, Any]:
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
    }


def _sounded(rate_hz: int, tones_hz: Sequence[float]) -> torch.Tensor:
    """Tones one after the other, a second each, with a little noise: something to hear."""
    seconds = torch.arange(rate_hz) / rate_hz
    tones = torch.cat([torch.sin(2 * torch.pi * tone * seconds) for tone in tones_hz])
    return 0.3 * tones + 0.01 * torch.randn(tones.shape, generator=torch.Generator().manual_seed(0))


def _drawn() -> Image.Image:
    """Stripes of three colours with a red square: something to look at."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", _SIZE_PX, (240, 240, 200))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 60, 160, 112), fill=(60, 140, 70))
    pen.rectangle((100, 20, 140, 50), fill=(200, 30, 30))
    return picture
