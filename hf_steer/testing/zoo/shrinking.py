"""A configuration made small: fewer layers, one of each kind; smaller numbers; token numbers inside the smaller vocabulary."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_steer.testing.zoo.exceptions import EXCEPTIONS
from hf_steer.testing.zoo.sizes import DEPTHS, HEAD_SIZE, LISTS, WORDS, greatest

LEFT_OUT = (
    "transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype", "id2label", "label2id", "output_attentions"
)  # fmt: skip
LEAST_LAYERS = 2
PLAIN_TOKENS = 8
"""Token numbers below are small enough to stay."""


class TokenNumbers:
    """Special tokens, counted down from the end of the small vocabulary; the same number in all sections stays the same."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}

    def small(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.small(one) for one in value]
        if isinstance(value, bool) or not isinstance(value, int) or value < PLAIN_TOKENS:
            return value
        return self.known.setdefault(value, WORDS - PLAIN_TOKENS - len(self.known))


def shrink(section: Mapping[str, Any], tokens: TokenNumbers) -> dict[str, Any]:
    """A section of a configuration, and those inside it, made small.

    Args:
        section: of `config.to_dict()`.
        tokens: shared by all sections of one configuration.
    """
    depth = _depth(section)
    kept = kept_layers(section, depth) if depth else []
    small = {
        name: _value(name, value, section, depth, kept, tokens)
        for name, value in section.items() if name not in LEFT_OUT
    }  # fmt: skip
    if isinstance(section.get("kv_lora_rank"), int) and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]  # keys come out of the bottleneck for each head
        if section.get("qk_rope_head_dim") and section.get("head_dim") == section["qk_rope_head_dim"]:
            small["head_dim"] = small["qk_rope_head_dim"]  # the name is that of the rotated features in some
    return with_paths(small, EXCEPTIONS.get(section.get("model_type", ""), {}))


def with_paths(section: dict[str, Any], paths: Mapping[str, Any]) -> dict[str, Any]:
    """A section with values set by their dotted paths."""
    for path, value in paths.items():
        place, (*way, name) = section, path.split(".")
        for step in way:
            place = place.setdefault(step, {})
        place[name] = copy.deepcopy(value)
    return section


def _depth(section: Mapping[str, Any]) -> int:
    """Its number of layers, where it has one; of several the one that its lists are as long as."""
    depths = [value for name, value in section.items() if DEPTHS.fullmatch(name) and isinstance(value, int)]
    first: int = section.get("num_hidden_layers") or next(iter(depths), 0)
    return first


def kept_layers(section: Mapping[str, Any], depth: int) -> list[int]:
    """Numbers of the layers that stay: the first of each kind, and at least two."""
    kinds: list[list[Any]] = [[] for _ in range(depth)]
    for name, value in section.items():
        if _is_per_layer(value, depth) and not _counts_up(value):
            named = [one if isinstance(one, (str, bool)) or one in (0, 1) else None for one in value]
            kinds = [[*kind, one] for kind, one in zip(kinds, named, strict=True)]
        elif _names_layers(name, value, depth):
            kinds = [[*kind, layer in value] for layer, kind in enumerate(kinds)]
    first = {str(kind): layer for layer, kind in reversed(list(enumerate(kinds)))}
    kept = set(first.values())
    for layer in (depth - 1, 0, *range(depth)):
        if len(kept) >= min(LEAST_LAYERS, depth):
            break
        kept.add(layer)
    return sorted(kept)


def _is_per_layer(value: Any, depth: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == depth > 1


def _counts_up(value: Sequence[Any]) -> bool:
    return list(value) == list(range(len(value)))


def _names_layers(name: str, value: Any, depth: int) -> bool:
    """Whether this is a list of numbers of layers."""
    if not isinstance(value, (list, tuple)) or not value or not re.search(r"layer|idxs|indices|indexes", name):
        return False
    numbers = all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < depth for one in value)
    return numbers and list(value) == sorted(set(value))


def _value(name: str, value: Any, section: Mapping[str, Any], depth: int, kept: list[int], tokens: TokenNumbers) -> Any:
    if isinstance(value, dict):
        return _mapping(name, value, section, kept, tokens)
    if name in LISTS and isinstance(value, (list, tuple)):
        return LISTS[name]
    if depth and _names_layers(name, value, depth) and not (_is_per_layer(value, depth) and not _counts_up(value)):
        return [kept.index(layer) for layer in value if layer in kept]
    if _is_per_layer(value, depth):
        return [_number(name, value[layer]) for layer in kept]
    if re.search(r"(^|_)(token_ids?|token_index|ids?|index)$", name):
        return tokens.small(value)
    if DEPTHS.fullmatch(name) and isinstance(value, int):
        return len(kept) if value == depth else min(value, LEAST_LAYERS)
    if "layerdrop" in name:
        return 0.0
    return _number(name, value)


def _number(name: str, value: Any) -> Any:
    size = greatest(name)
    if value is None and name == "head_dim":
        return size  # some ask for the number itself
    if size is None or isinstance(value, bool) or not isinstance(value, int):
        return value
    return min(value, size)


def _mapping(name: str, value: dict[str, Any], section: Mapping[str, Any], kept: list[int], tokens: TokenNumbers) -> dict[str, Any]:
    if name == "per_layer_config":
        return {str(kept.index(int(layer))): shrink(own, tokens) for layer, own in value.items() if int(layer) in kept}
    if name in ("rope_parameters", "rope_scaling"):
        return _rotation(value, section)
    return shrink(value, tokens) if "model_type" in value or name.endswith("_config") else value


def _rotation(rope: dict[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embeddings for the small heads: as many frequencies as half of the features that rotate."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {kind: _rotation(own, section) if isinstance(own, dict) else own for kind, own in rope.items()}
    rotated = greatest("qk_rope_head_dim") if section.get("qk_rope_head_dim") else HEAD_SIZE
    share = rope.get("partial_rotary_factor") or section.get("partial_rotary_factor") or 1.0
    half = max(int((rotated or 0) // 2 * share), 1)
    small = dict(rope)
    if isinstance(parts := rope.get("mrope_section"), (list, tuple)):
        small["mrope_section"] = [half - half // len(parts) * (len(parts) - 1), *[half // len(parts)] * (len(parts) - 1)]
    for name in ("short_factor", "long_factor"):
        if isinstance(rope.get(name), (list, tuple)):
            small[name] = [1.0] * half
    if rope.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = 64
    return small
