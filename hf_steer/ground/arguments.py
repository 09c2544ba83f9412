"""What transformers calls its arguments: our word for each, and every spelling that a supported version uses."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_steer.ground.caches import SELF_PART

ARGUMENTS: Mapping[str, tuple[str, ...]] = (  # a plain dictionary: compiled graphs cannot read a mapping proxy
    {
        # of a prompt
        "ids": ("input_ids",),
        "embeds": ("inputs_embeds",),
        "mask": ("attention_mask",),
        "labels": ("labels",),
        "loss_items": ("num_items_in_batch",),
        # what holds the keys; renamed in 5.24, and the old name still comes in from users' loops
        "cache": ("cache", "past_key_values"),
        "keeps_cache": ("use_cache",),
        "logits_kept": ("logits_to_keep",),
        # of a decoder that reads an encoder
        "encoder_states": ("encoder_hidden_states", "cross_attention_states"),
        "encoder_mask": ("encoder_attention_mask", "cross_attention_mask"),
        "decoder_ids": ("decoder_input_ids",),
        "decoder_embeds": ("decoder_inputs_embeds",),
        "decoder_mask": ("decoder_attention_mask",),
        # of pictures, videos and sounds
        "encoded": ("mm_encoder_outputs",),
        "image_pixels": ("pixel_values", "image_pixel_values", "flattened_patches"),
        "video_pixels": ("pixel_values_videos",),
        "mels": ("input_features", "audio_input_features", "audio_input_ids"),
        "samples": ("input_values",),
        "mel_mask": (
            "feature_attention_mask", "input_features_mask", "audio_attention_mask", "input_values_mask", "audio_input_ids_mask",
            "padding_mask",
        ),
        # these read the same of a call, by what they count
        "frame_mask": ("audio_input_ids_mask",),
        "sample_mask": ("input_values_mask", "padding_mask"),
        "sample_counts": ("chunk_sample_lengths",),
        "sound_tokens": ("audio_embed_sizes",),
        "image_grids": ("image_grid_thw",),
        "video_grids": ("video_grid_thw",),
        "grids": ("grid_thw",),
        "image_sizes": ("image_sizes",),
        "patch_places": ("image_position_ids",),
        "tilings": ("aspect_ratio_ids",),
        "images_per_row": ("batch_num_images",),
        "token_kinds": ("mm_token_type_ids",),
        "aspect_ratio": ("vision_aspect_ratio",),
        "feature_strategy": ("vision_feature_select_strategy",),
        # of generate
        "inputs": ("inputs",),
        "settings": ("generation_config",),
        "pad_token": ("pad_token_id",),
        "end_tokens": ("eos_token_id",),
        "guidance": ("guidance_scale",),
        "draft_model": ("assistant_model",),
        "draft_exit": ("assistant_early_exit",),
    }
)
"""Our word -> their spellings, the newest first."""
PERCEIVED = ("encoded", "image_pixels", "video_pixels", "mels", "samples")
"""Words for what an encoder reads, or has read."""
IGNORED_LABEL = -100
_WORDS: Mapping[str, str] = {name: word for word, names in ARGUMENTS.items() for name in names}
"""Their spelling -> our word."""


class Given:
    """The arguments of one call, read by our words: `given.ids`, `given.cache`; None for one that did not come.

    Attributes:
        named: the arguments by transformers' names.
        own: further spellings of this module, found by `own_spellings`.
        perceives: whether pictures or sounds come along.
        source: token numbers, or embeddings when they come alone or as the longer ones: `(batch, tokens, ...)`; None without.
    """

    def __init__(self, named: Mapping[str, Any], own: Mapping[str, str] | None = None) -> None:
        self.named = named
        self.own = own or {}
        self.perceives = False
        for name, value in named.items():
            word = _WORDS.get(name)
            if value is None or word is None or (name != ARGUMENTS[word][0] and named.get(ARGUMENTS[word][0]) is not None):
                continue
            setattr(self, word, value)
            self.perceives = self.perceives or word in PERCEIVED
        for word, name in self.own.items():
            if getattr(self, word) is None:
                setattr(self, word, named.get(name))
        cache: Any = getattr(self, "cache", None)
        if cache is not None:
            setattr(self, "cache", getattr(cache, SELF_PART, cache))  # noqa: B010 - an attribute by one of our words
        ids, embeds = self.ids, self.embeds
        alone = ids is None or (embeds is not None and ids.shape[:2] != embeds.shape[:2])
        self.source: Any = embeds if alone else ids

    def __getattr__(self, word: str) -> Any:
        raise AttributeError(f"{word!r} is no word of ground/arguments.py; it has {', '.join(ARGUMENTS)}.")

    def pixels(self, modality: str) -> Any:
        """Pixels of `"image"` or `"video"`."""
        return self.image_pixels if modality == "image" else self.video_pixels if modality == "video" else None

    def features(self, modality: str) -> Any:
        """What the caller had encoded of a modality: the encoder's output; None without."""
        return (self.encoded or {}).get(modality)

    def count_tokens(self) -> int:
        """Tokens per row."""
        tokens: int = 0 if self.source is None else self.source.shape[1]
        return tokens

    def with_mask(self, mask: Tensor | None) -> Given:
        """The same arguments with a mask."""
        return self if mask is self.mask else Given({**self.named, ARGUMENTS["mask"][0]: mask}, self.own)

    def every(self, copies: int) -> Given:
        """The same with one of every so many rows of tokens and mask."""
        ours = {name for word in ("ids", "embeds", "mask") for name in ARGUMENTS[word]}
        rows = {name: value[::copies] for name, value in self.named.items() if name in ours and isinstance(value, Tensor)}
        return Given({**self.named, **rows}, self.own)

    def of_decoder(self) -> Given:
        """What the decoder of an encoder-decoder is going to get, whose own tokens come under other names."""
        moved = {"decoder_ids": "ids", "decoder_embeds": "embeds", "decoder_mask": "mask"}
        names = {ARGUMENTS[word][0]: ARGUMENTS[own][0] for word, own in moved.items()}
        gone = {name for own in moved.values() for name in ARGUMENTS[own]} | set(ARGUMENTS["labels"])
        kept = {name: value for name, value in self.named.items() if name not in gone}
        return Given({names.get(name, name): value for name, value in kept.items()}, self.own)

    def drafts_for(self, model: Any) -> bool:
        """Whether `generate` lets the model draft for itself."""
        return self.draft_exit is not None or (self.draft_model is not None and self.draft_model is model)

    def guides(self, model: Any) -> bool:
        """Whether `generate` runs passes without the prompt beside those with it (classifier-free guidance)."""
        scale = self.setting("guidance", model.generation_config)
        return scale is not None and scale != 1

    def setting(self, word: str, default: Any) -> Any:
        """An option of `generate`: as it was given, or as its settings say, or else the model's own settings."""
        given = getattr(self, word)
        found = (getattr(settings, name, None) for settings in (self.settings, default) for name in ARGUMENTS[word])
        return given if given is not None else next((own for own in found if own is not None), None)


for _word in ARGUMENTS:  # None for what does not come; a plain attribute, since hooks read many of them in every pass
    setattr(Given, _word, None)


def read_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """What a module is called with."""
    own = own_spellings(type(module))
    if not args:
        return Given(kwargs, own)
    names = inspect.signature(module.forward).parameters
    return Given({**dict(zip(names, args, strict=False)), **kwargs}, own)


def read_generate(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
    """What `generate` is called with; its first positional arguments are `inputs` and `generation_config`."""
    named = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
    if named.get("inputs") is not None:
        named["input_ids"] = named["inputs"]
    return Given(named)


def inferred_mask(given: Given, model: Any) -> Tensor | None:
    """The mask that `generate` makes when none is given: from the padding token, unless that also ends sequences."""
    pad = given.setting("pad_token", model.generation_config)
    ends = given.setting("end_tokens", model.generation_config)
    if given.ids is None or pad is None or pad in (ends if isinstance(ends, (list, tuple)) else [ends]):
        return None
    mask: Tensor = given.ids != pad
    return mask


def spelling_in(module: nn.Module, word: str) -> str | None:
    """The name under which a module's forward takes an argument; None where it takes none of that kind by name."""
    names = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    found = next((name for name in ARGUMENTS[word] if name in names), None)
    return found or own_spellings(type(module)).get(word)


def unknown_masks(module: nn.Module) -> list[str]:
    """Arguments of a module's forward that are masks, as far as their names tell, and none that are known."""
    names = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    own = set(own_spellings(type(module)).values())
    return [name for name in names if name.endswith(("mask", "masks")) and name not in _WORDS and name not in own]


def name_of(word: str) -> str:
    """How users know an argument, for messages: the newest spelling, older ones behind it in brackets."""
    newest, *older = ARGUMENTS[word]
    return f"{newest} ({', '.join(older)})" if older else newest


def named(**values: Any) -> dict[str, Any]:
    """Arguments by transformers' names, out of ours. One that modules spell differently goes through `with_changes`."""
    return {ARGUMENTS[word][0]: value for word, value in values.items()}


def with_changes(module: nn.Module, given: Given, **changes: Any) -> dict[str, Any]:
    """All arguments by transformers' names, some of them replaced: under the name that came, or the one that the module takes."""
    named = dict(given.named)
    for word, value in changes.items():
        own = [given.own[word]] if word in given.own else []
        came = next((name for name in (*ARGUMENTS[word], *own) if name in named), None)
        name = came or spelling_in(module, word) or ARGUMENTS[word][0]
        named[name] = value
    return named


_OWN: dict[type, Mapping[str, str]] = {}


def own_spellings(kind: type) -> Mapping[str, str]:
    """Spellings of a module class that the table lacks: of the cache, told by its type, so that a next renaming is no loss."""
    if kind not in _OWN and kind is not type(None):
        parameters = inspect.signature(inspect.unwrap(kind.forward)).parameters  # type: ignore[attr-defined]
        known = any(name in parameters for name in ARGUMENTS["cache"])
        caches = [name for name, own in parameters.items() if re.search(r"\b(Dynamic|Static)?Cache\b", str(own.annotation))]
        _OWN[kind] = {"cache": caches[0]} if not known and len(caches) == 1 else {}
    return _OWN.get(kind, {})
