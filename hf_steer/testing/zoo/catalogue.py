"""What there is: the entries of transformers' auto mappings that read or write text."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers.models.auto import modeling_auto

from hf_steer.errors import ConfigError

MAPPINGS = {
    "image": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "rnnt": "MODEL_FOR_RNNT_MAPPING_NAMES",
    "tdt": "MODEL_FOR_TDT_MAPPING_NAMES",
}
"""Our word for a kind of model -> the mapping; one that a version lacks is skipped. An architecture is of the first that has it."""


class Architecture(NamedTuple):
    """One model class with the configuration it is used with."""

    model_type: str
    class_name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.model_type}-{self.class_name}"


def architectures() -> tuple[Architecture, ...]:
    """All that the installed transformers has, each once, by name."""
    found: dict[tuple[str, str], str] = {}
    for kind, mapping in MAPPINGS.items():
        entries: dict[str, Any] = getattr(modeling_auto, mapping, {})
        for model_type, classes in entries.items():
            for class_name in (classes,) if isinstance(classes, str) else classes:
                found.setdefault((model_type, class_name), kind)
    return tuple(Architecture(*names, kind) for names, kind in sorted(found.items()))


def find(model_type: str, class_name: str | None = None) -> Architecture:
    """The architecture of a model type: of this class, or of the first kind in `MAPPINGS` that has one.

    Raises:
        ConfigError: there is none.
    """
    kinds = list(MAPPINGS)
    known = architectures()
    fitting = [one for one in known if one.model_type == model_type and class_name in (None, one.class_name)]
    if not fitting:
        classes = [one.class_name for one in known if one.model_type == model_type]
        raise ConfigError(
            f"the installed transformers has no {class_name or 'model'} of type {model_type!r}; "
            + (f"its classes are {', '.join(classes)}" if classes else "see architectures() for what it has")
        )
    return min(fitting, key=lambda one: kinds.index(one.kind))
