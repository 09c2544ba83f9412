"""A model of the user's own, its processor, and its examples, as the commands load them."""

from __future__ import annotations

import argparse
from typing import Any

from hf_steer.errors import FileError


def load_own(folder: Any, *, device: str, dtype: str = "auto") -> Any:
    """The base model in a folder or on the Hub, in evaluation mode.

    Raises:
        FileError: there is none.
    """
    from hf_steer.io import model_class_of, read_base_config, read_base_model

    model: Any = read_base_model(model_class_of(read_base_config(folder)), folder, dtype=dtype)
    return model.to(device).eval()


def load_processor(folder: Any) -> Any:
    """Its processor, or its tokenizer where it reads nothing but text.

    Raises:
        FileError: it has neither.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FileError(
            f"there is no processor or tokenizer at {str(folder)!r} ({error}); save the model's beside it: "
            "processor.save_pretrained(folder)."
        ) from error


def attends_of(model: Any, arguments: argparse.Namespace) -> str:
    """What is steered for the lines of an examples file: of a decoder that reads an encoder, what that hands on of a sound."""
    from hf_steer.analysis.asked import read_lines
    from hf_steer.ground.decoders import reads_encoder

    heard = arguments.examples_file is not None and read_lines(arguments.examples_file)[0].form == "audio"
    return "cross" if heard and reads_encoder(model) else "self"
