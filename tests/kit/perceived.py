"""Pictures and sounds for any tiny model: what its own method or forward takes, found by trying the forms that exist."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

FEATURES = {"image": ("get_image_features", "get_video_features"), "audio": ("get_audio_features",)}
WORD = 5
PIXELS = ("pixel_values", "flattened_patches", "image_pixel_values", "pixel_values_images", "pixel_values_videos")
GRIDS = ("image_grid_thw", "image_grid_hw", "target_sizes", "image_merge_sizes", "image_position_ids")
MELS = (
    "num_mel_bins", "n_mels", "input_feat_size", "input_size", "input_dim", "feature_size", "feat_extract_input_dim",
    "feature_projection_input_dim",
)  # fmt: skip


class Shown:
    """One way to show a model something: a function of the model, and its arguments."""

    def __init__(self, owner: str, method: str, named: dict[str, Any]) -> None:
        self.owner, self.method, self.named = owner, method, named

    def call(self, model: Any) -> Any:
        torch.manual_seed(0)  # some draw what they hand on
        return getattr(model.get_submodule(self.owner), self.method)(**self.named)

    def features(self, model: Any) -> list[Tensor]:
        """All tensors of numbers that it gives, without what the tower did on the way."""
        output = self.call(model)
        if isinstance(output, ModelOutput):
            wanted = ("pooler_output", "logits", "deepstack_features")
            said = [getattr(output, name, None) for name in wanted]  # older releases set what is no field of the output
            output = [own for own in said if own is not None] or output.to_tuple()
        return list(flattened(output))


def flattened(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for own in value:
            yield from flattened(own)
    elif isinstance(value, ModelOutput):
        yield from flattened(value.to_tuple())


def shown(model: Any, modality: str, outlet: nn.Module) -> Shown:
    """The first form that the model takes, and that comes by a module.

    Raises:
        AssertionError: it takes none of those that are known here; the last faults are told.
    """
    faults: list[str] = []
    passed: list[int] = []
    handle = outlet.register_forward_hook(lambda *_: passed.append(1))
    try:
        return _shown(model, modality, passed, faults)
    finally:
        handle.remove()


def _shown(model: Any, modality: str, passed: list[int], faults: list[str]) -> Shown:
    for owner, method, function in methods(model, modality):
        taken = inspect.signature(inspect.unwrap(function)).parameters
        for named in forms(model, modality, tuple(taken)):
            show = Shown(owner, method, named)
            passed.clear()
            try:
                with torch.no_grad():
                    found = show.features(model)
            except Exception as error:
                faults.append(f"{ {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in named.items()} }: {error!r}"[:400])
                continue
            if passed and found and all(bool(own.isfinite().all()) for own in found) and any(own.numel() for own in found):
                return show
            faults.append("nothing, or nothing finite, came out, or it came by another way")
    raise AssertionError("\n".join(dict.fromkeys(faults)) or "no method")


def methods(model: Any, modality: str) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    for name in FEATURES[modality]:
        having = [path for path, module in model.named_modules() if callable(getattr(type(module), name, None))]
        if having:
            yield having[-1], name, getattr(type(model.get_submodule(having[-1])), name)
    yield "", "forward", type(model).forward


def every_config(config: Any) -> list[Any]:
    found = [config]
    for own in vars(config).values():
        if hasattr(own, "to_dict"):
            found += every_config(own)
    return found


def settings(model: Any, names: tuple[str, ...]) -> list[int]:
    """Values of these names in all of a model's configurations, without repetition."""
    found: list[int] = []
    for config in every_config(model.config):
        for name in names:
            value = getattr(config, name, None)
            for own in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(own, int) and own > 0 and own not in found:
                    found.append(own)
    return found


def forms(model: Any, modality: str, taken: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Arguments, the commonest first."""
    yield from (picture_forms if modality == "image" else sound_forms)(model, taken)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.5


def picture_forms(model: Any, taken: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    main = next((own for own in PIXELS if own in taken), None)
    if main is None:
        return
    if main == "flattened_patches":
        places = torch.stack([torch.arange(6) // 3, torch.arange(6) % 3], -1).float().expand(2, -1, -1)
        for size in settings(model, ("patch_embed_hidden_size",)):
            yield {main: torch.cat([places, _noise(2, 6, size)], -1), "decoder_input_ids": torch.full((2, 3), WORD)}
            yield {main: torch.cat([places, _noise(2, 6, size)], -1)}
    sides = [own for own in dict.fromkeys([*settings(model, ("image_size",)), 32, 64]) if own <= 448]
    patches = settings(model, ("patch_size",)) or [8]
    steps = [*dict.fromkeys([*settings(model, ("temporal_patch_size",)), 1, 2])]
    if not any(own in taken for own in GRIDS):
        for side in sides:
            several = (_noise(2, 1, 4, 3, side, side),) if "aspect_ratio_ids" in taken else ()
            for pixels in (_noise(2, 3, side, side), _noise(1, 2, 3, side, side), _noise(2, 1, 3, side, side), *several):
                for extra in picture_extras(model, taken, pixels, side):
                    yield {main: pixels, **extra}
                    yield {main: pixels, **{name: value for name, value in extra.items() if name != "image_sizes"}}
    for patch, step in itertools.product(patches, steps):
        for merge in dict.fromkeys([*settings(model, ("spatial_merge_size", "merge_size", "pooling_kernel_size")), 2]):
            height, width = 2 * merge, 4 * merge
            count = height * width
            flat = (_noise(count, 3 * step * patch * patch), _noise(count, 3, patch, patch), _noise(count, 3, step, patch, patch))
            ids = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).reshape(1, -1, 2)
            several = (_noise(1, count, 3 * step * patch * patch), _noise(1, 3, patch, patch * count))
            for pixels in (*flat, *several):
                extra: dict[str, Any] = {}
                for name, value in (
                    ("image_grid_thw", torch.tensor([[1, height, width]])),
                    ("image_grid_hw", torch.tensor([[height, width]])),
                    ("target_sizes", torch.tensor([[height, width]])),
                    ("image_merge_sizes", torch.tensor([merge])),
                    ("image_position_ids", ids),
                    ("spatial_shapes", torch.tensor([[height, width]])),
                    ("pixel_attention_mask", torch.ones(1, count, dtype=torch.long)),
                ):
                    if name in taken:
                        extra[name] = value
                yield {main: pixels, **extra}


def picture_extras(model: Any, taken: tuple[str, ...], pixels: Tensor, side: int) -> Iterator[dict[str, Any]]:
    rows = pixels.shape[0]
    extra: dict[str, Any] = {}
    if "image_sizes" in taken:
        extra["image_sizes"] = torch.tensor([[side, side]] * rows)
    if "pixel_attention_mask" in taken and pixels.ndim == 5:
        extra["pixel_attention_mask"] = torch.ones(*pixels.shape[:2], side, side, dtype=torch.long)
    if "high_res_pixel_values" in taken:
        big = max(settings(model, ("image_size",)) or [64])
        extra["high_res_pixel_values"] = _noise(rows, 3, big, big)
    if "qformer_input_ids" in taken:
        extra["qformer_input_ids"] = torch.full((rows, 3), WORD)
    if "num_local_patches" in taken:
        extra["num_local_patches"] = [0] * rows
    if "image_token_pooling" in taken:
        extra["image_token_pooling"] = torch.arange(4).view(4, 1)
        extra["image_grids"] = torch.tensor([[1, 2, 1, 2]])
    if "input_ids" not in taken:
        yield extra
        return
    for image in settings(model, ("image_token_id", "image_token_index"))[:1]:
        for count in (1, 2, 4, 8, 16, 32):
            ids = torch.tensor([[WORD, *[image] * count, WORD]] * rows)
            yield {**extra, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    extra["input_ids"] = torch.full((rows, 6), WORD)
    if "attention_mask" in taken:
        extra["attention_mask"] = torch.ones(rows, 6, dtype=torch.long)
    if "decoder_input_ids" in taken:
        extra["decoder_input_ids"] = torch.full((rows, 3), WORD)
    if "aspect_ratio_ids" in taken:
        extra["aspect_ratio_ids"] = torch.ones(rows, 1, dtype=torch.long)
        extra["aspect_ratio_mask"] = torch.ones(rows, 1, 4, dtype=torch.long)
        extra["cross_attention_mask"] = torch.ones(rows, 6, 1, 4, dtype=torch.long)
    if "image_attention_mask" in taken:
        extra["image_attention_mask"] = torch.ones(rows, 6, 1, dtype=torch.long)
    yield extra
    yield {name: value for name, value in extra.items() if name not in ("input_ids", "attention_mask")}


def sound_forms(model: Any, taken: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    words: dict[str, Any] = {}
    if "decoder_input_ids" in taken:
        words["decoder_input_ids"] = torch.full((2, 3), WORD)
    main = next((own for own in ("input_values", "input_features", "audio_input_features") if own in taken), None)
    if main is None:
        return
    ids = settings(model, ("audio_token_id", "audio_token_index"))
    if main == "input_values":
        for samples in (3200, 6400, 16000):
            for shape in ((2, samples), (2, 1, samples)):
                mask = torch.ones(2, samples, dtype=torch.long)
                yield {main: _noise(*shape), **_masks(taken, mask), **words}
    bins = dict.fromkeys([*settings(model, MELS), 16, 80, 128])
    windows = [2 * own for own in settings(model, ("max_source_positions",)) if own < 200]
    for mels, frames in itertools.product(bins, dict.fromkeys([*windows, 80, 64, 96, 200, 400])):
        mask = torch.ones(2, frames, dtype=torch.long)
        for shape in ((2, mels, frames), (2, frames, mels)):
            named = {main: _noise(*shape), **_masks(taken, mask), **words}
            if "audio_feature_lengths" in taken:
                named["audio_feature_lengths"] = torch.tensor([frames, frames])
            if "input_ids" in taken and "decoder_input_ids" not in taken:
                for tokens in [frames // part for part in (4, 2, 8, 1, 16)] if ids else [1]:
                    row = [WORD, *(ids[:1] * tokens), WORD]
                    both = torch.tensor([row, row])
                    yield {**named, "input_ids": both, "attention_mask": torch.ones_like(both)}
            else:
                yield named


def _masks(taken: tuple[str, ...], mask: Tensor) -> dict[str, Tensor]:
    own = ("input_features_mask", "feature_attention_mask", "padding_mask", "input_values_mask", "audio_attention_mask")
    return {name: mask for name in own if name in taken}


def suited(model: Any) -> Any:
    """A model of the zoo, some of whose sizes are made such that the smallest picture goes through."""
    side = next(iter(settings(model, ("image_size",))), 32)
    for config in every_config(model.config):
        if getattr(config, "image_grid_pinpoints", None):
            config.image_grid_pinpoints = [[side, side]]
        if getattr(config, "vision_feature_layers", None):
            config.vision_feature_layers = [-1] * len(config.vision_feature_layers)
    for module in model.modules():
        if getattr(module, "window_size", None) == 8 and hasattr(module, "spatial_merge_size"):
            module.window_size = 64
        if hasattr(module, "patch_to_query_dict"):
            module.patch_to_query_dict = {(side // 8) ** 2: 4}
    return model
