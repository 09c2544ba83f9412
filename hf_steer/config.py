"""What the user asks for: frozen, validated at birth, JSON on disk."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from hf_steer.checks import (
    Heads,
    Strength,
    check_choice,
    check_flag,
    check_heads,
    check_indices,
    check_number,
    check_strength,
)
from hf_steer.errors import ConfigError, FileError
from hf_steer.files import find_file, write_whole

SCHEMA_VERSION = 1
CONFIG_NAME = "steer_config.json"

NORMALIZATIONS = ("zscore", "minmax", "rank", "none")
SOURCES = ("vision_attention", None)
QUERIES = ("all", "generated")
BACKENDS = ("auto", "folded", "mask")


@dataclass(frozen=True)
class SaliencyConfig:
    """Where the score of each token comes from, and how it is scaled.

    Args:
        source: `"vision_attention"` reads the model's own eyes: the attention that each patch receives in the vision
            tower. None takes only what `use_saliency` supplies.
        normalize: per picture, per video frame, or over the row's real tokens for token scores. `"zscore"` is clipped
            at `clip`; `"minmax"` and `"rank"` give [0, 1]; `"none"` uses the scores as they are. Constant scores
            become zeros.
        clip: largest absolute z-score, above 0. Two outlier patches would otherwise take most of the bias.
        blocks: vision blocks to read; negative counts from the last. Several are averaged.
        preserve_mass: subtract `log mean exp(λs)` over each group, so that the bias moves attention *within* a picture
            rather than towards it. Exact where the unsteered attention inside the picture is uniform.
    """

    source: Literal["vision_attention"] | None = "vision_attention"
    normalize: Literal["zscore", "minmax", "rank", "none"] = "zscore"
    clip: float = 3.0
    blocks: tuple[int, ...] = (-1,)
    preserve_mass: bool = False

    def __post_init__(self) -> None:
        check_choice("saliency.source", self.source, SOURCES)
        check_choice("saliency.normalize", self.normalize, NORMALIZATIONS)
        check_number("saliency.clip", self.clip)
        if self.clip <= 0:
            raise ConfigError(f"saliency.clip must be above 0; got {self.clip}. The default is 3.0.")
        check_flag("saliency.preserve_mass", self.preserve_mass)
        blocks = (self.blocks,) if isinstance(self.blocks, int) else self.blocks
        object.__setattr__(self, "blocks", check_indices("saliency.blocks", blocks, signed=True))


@dataclass(frozen=True)
class AttentionConfig:
    """Which heads are biased towards salient tokens, how hard, and for which queries.

    The bias is `λ_h · s_k`, added to the attention logits: `softmax(q·kᵀ/√d + λ_h·s_k)`.

    Args:
        heads: `"all"`, or `{layer: heads}` with a tuple of query heads or `"all"`. Layers count from 0; negative
            layers count from the last.
        strength: λ. One number, `{layer: number}`, or `{layer: {head: number}}`. Negative turns the gaze away.
        saliency: where the scores come from.
        queries: `"all"`, or `"generated"`: only queries out of which a token is generated, the prompt's last token
            included (the first new token comes out of it). In a training step these are the positions before a label.
        backend: `"auto"` folds the bias into the head dimension for prompts and adds a mask for single queries;
            `"folded"` and `"mask"` do one of the two always.
    """

    heads: Heads = "all"
    strength: Strength = 1.0
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    queries: Literal["all", "generated"] = "all"
    backend: Literal["auto", "folded", "mask"] = "auto"

    def __post_init__(self) -> None:
        check_choice("attention.queries", self.queries, QUERIES)
        check_choice("attention.backend", self.backend, BACKENDS)
        if not isinstance(self.saliency, SaliencyConfig):
            raise ConfigError(f"attention.saliency must be a SaliencyConfig; got {type(self.saliency).__name__}.")
        object.__setattr__(self, "heads", check_heads(self.heads))
        object.__setattr__(self, "strength", check_strength(self.strength))
        self._refuse_strength_elsewhere()

    def _refuse_strength_elsewhere(self) -> None:
        """A strength for a layer or head that is not steered would be ignored; a steered one without would be a guess."""
        if not isinstance(self.strength, Mapping) or not isinstance(self.heads, Mapping):
            return
        if set(self.strength) != set(self.heads):
            raise ConfigError(
                f"attention.strength names layers {sorted(self.strength)}, attention.heads {sorted(self.heads)}; "
                "give a strength for just the layers that are steered."
            )
        for layer, strength in self.strength.items():
            heads = self.heads[layer]
            if isinstance(strength, Mapping) and not isinstance(heads, str) and set(strength) != set(heads):
                raise ConfigError(
                    f"attention.strength of layer {layer} names heads {sorted(strength)}, attention.heads "
                    f"{sorted(heads)}; give a strength for just the heads that are steered."
                )


@dataclass(frozen=True)
class SteerConfig:
    """All that hf_steer does to one model; saved next to it as `steer_config.json`.

    Args:
        attention: the gaze; None leaves attention alone.
        base_model_type: `config.model_type` of the model that this was saved with; patching another raises.
        schema_version: format of the file, written by this version.
    """

    attention: AttentionConfig | None = None
    base_model_type: str | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.attention is not None and not isinstance(self.attention, AttentionConfig):
            raise ConfigError(f"attention must be an AttentionConfig or None; got {type(self.attention).__name__}.")
        if self.base_model_type is not None and not isinstance(self.base_model_type, str):
            raise ConfigError(f"base_model_type must be a string or None; got {self.base_model_type!r}.")
        if isinstance(self.schema_version, bool) or not isinstance(self.schema_version, int) or self.schema_version < 1:
            raise ConfigError(f"schema_version must be a positive integer; got {self.schema_version!r}.")
        if self.schema_version > SCHEMA_VERSION:
            raise ConfigError(
                f"this configuration has schema_version {self.schema_version}; this hf_steer reads up to "
                f"{SCHEMA_VERSION}. Upgrade: pip install -U hf-steer."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal object back."""
        return cast(dict[str, Any], _plain(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SteerConfig:
        """Build from JSON values.

        Raises:
            ConfigError: an unknown key (the nearest known one is named), a missing one, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration must be a mapping; got {type(values).__name__}.")
        version = values.get("schema_version")
        if version is None:
            raise ConfigError(f"schema_version is missing; this hf_steer writes {SCHEMA_VERSION}.")
        if isinstance(version, int) and version > SCHEMA_VERSION:  # before the keys: a newer file has newer ones
            cls(schema_version=version)
        return cast(SteerConfig, _build(cls, values, ""))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any) -> str:
        """Write `steer_config.json`, whole or not at all.

        Args:
            save_directory: created when it is not there.
            push_to_hub: also upload it; `repo_id` (default: the folder's name) and the arguments of `push_to_hub`
                follow as keywords.

        Returns:
            The path that was written.
        """
        path = Path(save_directory) / CONFIG_NAME
        write_whole(path, self.to_json().encode())
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return str(path)

    @classmethod
    def from_pretrained(cls, id_or_dir: str | os.PathLike[str], **hub_kwargs: Any) -> SteerConfig:
        """Read `steer_config.json` from a folder or from the Hub.

        Args:
            id_or_dir: a folder, or a Hub repository.
            **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, as
                `huggingface_hub.hf_hub_download` takes them.

        Raises:
            FileError: nothing there, or not a steering configuration.
            ConfigError: a newer schema, an unknown key, a value out of range.
        """
        path = find_file(id_or_dir, CONFIG_NAME, **hub_kwargs)
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise FileError(f"{path} is not valid JSON ({error}); it is truncated or foreign. Save it again.") from error
        if not isinstance(values, dict):
            raise FileError(f"{path} holds {type(values).__name__}, not a steering configuration; save it again.")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload `steer_config.json` to a Hub repository, which is created when it is not there.

        Args:
            repo_id: `user/name`.
            **kwargs: `private`, `token` for the repository; `commit_message`, `revision`, `create_pr` for the commit.

        Returns:
            Address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=kwargs.pop("token", None))
        url = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
        kwargs.setdefault("commit_message", "Upload steering configuration")
        commit = api.upload_file(
            path_or_fileobj=self.to_json().encode(), path_in_repo=CONFIG_NAME, repo_id=url.repo_id, **kwargs
        )
        return str(commit.commit_url)


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Strictly: every key known, every nested configuration built by its own class."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the configuration'} must be a mapping; got {type(values).__name__}.")
    names = [item.name for item in dataclasses.fields(cls)]
    unknown = [
        f"{key!r}" + (f" (did you mean {near[0]!r}?)" if (near := difflib.get_close_matches(str(key), names, 1)) else "")
        for key in values
        if key not in names
    ]
    if unknown:
        raise ConfigError(f"{where or cls.__name__} has no {', '.join(unknown)}; it has {', '.join(names)}.")
    nested: dict[str, type] = {"attention": AttentionConfig, "saliency": SaliencyConfig}
    built = {
        key: _build(nested[key], value, f"{where}.{key}".lstrip(".")) if key in nested and value is not None else value
        for key, value in values.items()
    }
    for key in ("heads", "strength"):
        if isinstance(built.get(key), Mapping):
            built[key] = _integer_keys(f"{where}.{key}", built[key])
    return cls(**built)


def _integer_keys(name: str, values: Mapping[Any, Any]) -> dict[int, Any]:
    """JSON has string keys only: `{"1": {"0": 2.0}}` is `{1: {0: 2.0}}`."""
    try:
        return {
            int(key): _integer_keys(name, value) if isinstance(value, Mapping) else value
            for key, value in values.items()
        }
    except ValueError as error:
        raise ConfigError(f"{name}: keys must be layer or head numbers ({error}).") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
