"""All that hf_steer does to one model, as one frozen value: JSON on disk, strict when read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from hf_steer.config.aligner import AlignerConfig
from hf_steer.config.attention import TRAINABLE, AttentionConfig, SaliencyConfig
from hf_steer.config.checks import check_flag
from hf_steer.config.gate import GateConfig
from hf_steer.config.providers import PLUGINS, note_plugins, refuse_missing
from hf_steer.config.record import RECORD, Record
from hf_steer.config.written import build, to_plain
from hf_steer.errors import ConfigError, FileError, shown
from hf_steer.files import find_file, read_json
from hf_steer.saving import whole_save

SCHEMA_VERSION = 2
CONFIG_NAME = "steer_config.json"
_NESTED: Mapping[str, type] = MappingProxyType(
    {"attention": AttentionConfig, "saliency": SaliencyConfig, "gate": GateConfig, "aligners": AlignerConfig}
)
"""Field -> what it holds, or holds several of."""


@dataclass(frozen=True)
class SteerConfig:
    """All that hf_steer does to one model; saved next to it as `steer_config.json`.

    Args:
        attention: the gaze; None leaves attention alone.
        aligners: what is inserted behind or inside frozen encoders; one per modality and placement.
        train_projector: the base's own projector, between encoder and language model, is trained and saved with the
            steering. Meant for models from `compose`, whose projector is new.
        base_model_type: `config.model_type` of the model that this was saved with; patching another raises.
        schema_version: format of the file, written by this version.
    """

    attention: AttentionConfig | None = None
    aligners: tuple[AlignerConfig, ...] = ()
    train_projector: bool = False
    base_model_type: str | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.attention is not None and not isinstance(self.attention, AttentionConfig):
            raise ConfigError(f"attention must be an AttentionConfig or None; got {type(self.attention).__name__}.")
        object.__setattr__(self, "aligners", self._checked_aligners())
        check_flag("train_projector", self.train_projector)
        if self.base_model_type is not None and not isinstance(self.base_model_type, str):
            raise ConfigError(f"base_model_type must be a string or None; got {shown(self.base_model_type)}.")
        if isinstance(self.schema_version, bool) or not isinstance(self.schema_version, int) or self.schema_version < 1:
            raise ConfigError(f"schema_version must be a positive integer; got {shown(self.schema_version)}.")
        if self.schema_version > SCHEMA_VERSION:
            raise ConfigError(
                f"this configuration has schema_version {shown(self.schema_version)}; this hf_steer reads up to "
                f"{SCHEMA_VERSION}. Upgrade: pip install -U hf-steer."
            )

    def _checked_aligners(self) -> tuple[AlignerConfig, ...]:
        given = (self.aligners,) if isinstance(self.aligners, AlignerConfig) else self.aligners
        if not isinstance(given, (tuple, list)) or not all(isinstance(aligner, AlignerConfig) for aligner in given):
            raise ConfigError(f"aligners must be a tuple of AlignerConfig; got {shown(self.aligners)}.")
        places = [(aligner.modality, aligner.placement) for aligner in given]
        twice = sorted({place for place in places if places.count(place) > 1})
        if twice:
            raise ConfigError(f"aligners has several for {twice[0][0]} at {twice[0][1]!r}; one per modality and placement.")
        return tuple(given)

    @property
    def has_weights(self) -> bool:
        """Whether parts of it are learned, and saved as weights."""
        return bool(self.aligners) or self.train_projector or self.learns_strength

    @property
    def learns_strength(self) -> bool:
        """Whether λ is learned."""
        return self.attention is not None and self.attention.strength == TRAINABLE

    def with_gaze_of(self, other: SteerConfig) -> SteerConfig | None:
        """This configuration with the gaze of another one, which has the same aligners, or none; None where it cannot be."""
        if self.attention is not None or other.attention is None:
            return None
        both = dataclasses.replace(self, attention=other.attention)
        alone = dataclasses.replace(both, aligners=(), train_projector=False)
        return both if other in (both, alone) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal object back. Names that are not ours come with their packages."""
        noted = note_plugins(self)
        return {**to_plain(self), **({PLUGINS: noted} if noted else {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SteerConfig:
        """Build from JSON values; what a save noted about its files (`Record`) is none of the configuration's.

        Raises:
            ConfigError: an unknown key (the nearest known one is named), a missing one, or a value out of range; a name whose
                package is not installed here.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration must be a mapping; got {type(values).__name__}.")
        version = values.get("schema_version")
        if version is None:
            raise ConfigError(f"schema_version is missing; this hf_steer writes {SCHEMA_VERSION}.")
        if isinstance(version, bool) or not isinstance(version, int) or version > SCHEMA_VERSION:
            cls(schema_version=version)  # raises, before the keys: a newer file has newer ones
        refuse_missing(values.get(PLUGINS, {}))
        own = {key: value for key, value in values.items() if key not in (RECORD, PLUGINS)}
        own = _from_first(own) if version == 1 else own
        return cast(SteerConfig, build(cls, own, _NESTED))

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
        with whole_save(save_directory) as stage:
            (stage / CONFIG_NAME).write_bytes(self.to_file())
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return str(Path(save_directory) / CONFIG_NAME)

    def to_file(self, record: Record | None = None) -> bytes:
        """What `steer_config.json` holds. Without a record it is saved by itself: weights that lie there are not its own."""
        record = Record() if record is None and self.has_weights else record
        noted = {} if record is None else {RECORD: dataclasses.asdict(record)}
        return (json.dumps({**self.to_dict(), **noted}, indent=2) + "\n").encode()

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
        return read_config(id_or_dir, **hub_kwargs)[0]

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
            path_or_fileobj=self.to_file(), path_in_repo=CONFIG_NAME, repo_id=url.repo_id, **kwargs
        )
        return str(commit.commit_url)


def _from_first(values: dict[str, Any]) -> dict[str, Any]:
    """A file of schema 1 with the same meaning today: what it leaves out was decided otherwise then."""
    attention = values.get("attention")
    if isinstance(attention, Mapping):
        saliency = attention.get("saliency", {})
        if isinstance(saliency, Mapping):
            saliency = {"normalize": "zscore", "preserve_mass": False, **saliency}
        attention = {"strength": 1.0, "queries": "all", **attention, "saliency": saliency}
    return {**values, "attention": attention, "schema_version": SCHEMA_VERSION}


def read_config(id_or_dir: str | os.PathLike[str], **hub_kwargs: Any) -> tuple[SteerConfig, Record | None, str]:
    """A saved configuration, what was noted when it was saved (None in a file that is older than such notes), and its path.

    Raises:
        FileError: nothing there, not a steering configuration, or one that lost the parts that its weights are for.
        ConfigError: as `SteerConfig.from_dict`.
    """
    values, path = _read_where_it_lies(id_or_dir, hub_kwargs)
    record = None if RECORD not in values else Record.from_json(values[RECORD], path)
    try:
        config = SteerConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if record is not None and record.weights is not None and not config.has_weights:
        raise FileError(
            f"{path} was saved with trained weights and names nothing now that they would be for: its aligners (or "
            "train_projector, or strength='trainable') were taken out. Put them back, or save it again."
        )
    return config, record, path


def _read_where_it_lies(id_or_dir: str | os.PathLike[str], hub_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A save moves files to their places; one that went while it was being read is looked for again."""
    for _ in range(20):
        path = find_file(id_or_dir, CONFIG_NAME, **hub_kwargs)
        try:
            return read_json(path), path
        except FileError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            gone = error
    raise gone
