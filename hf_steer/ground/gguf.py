"""Weights out of a GGUF file: how each release reads them as plain ones, and why some models cannot be written again."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_gguf_available

from hf_steer.errors import FileError


def require_gguf() -> None:
    """Raise where the package that reads GGUF is not there; transformers alone says so after a long way.

    Raises:
        FileError: it is not installed.
    """
    if not is_gguf_available():
        raise FileError("a GGUF file was named, and the package that reads it is not installed: pip install 'hf-steer[real]'.")


def plain_weights(gguf_file: str, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a model's `from_pretrained` that unpack a GGUF file into plain weights.

    5.14 always does; later releases with a `GgufConfig` keep them packed, or count the model as packed, unless told not to. What
    the caller says about it stands.
    """
    unpacks = getattr(transformers, "GgufConfig", None)
    default = {} if unpacks is None else {"quantization_config": unpacks(dequantize=True)}
    return {**default, **model_kwargs, "gguf_file": gguf_file}


def name_class(config: PreTrainedConfig) -> None:
    """Note the class of a model whose configuration comes out of a GGUF file, which says the kind of model alone."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not config.architectures and isinstance(name, str):
        config.architectures = [name]


def why_unwritable(model: Any) -> str | None:
    """What a model's weights are packed by that transformers reads and cannot write; None where it can."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or getattr(model, "_hf_peft_config_loaded", False) or quantizer.is_serializable():
        return None
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def gguf_file_of(model: Any) -> str | None:
    """The GGUF file that a packed model's weights came out of."""
    said = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    found: str | None = getattr(said, "gguf_file", None)
    return found
