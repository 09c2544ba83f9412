"""The tiny model that comes with the package."""

from __future__ import annotations

from pathlib import Path

from hf_steer.errors import FileError


def embedded_model_dir() -> Path:
    """The folder of the embedded model: inside an installed package, or `examples/tiny_r1_vl` of a clone.

    Raises:
        FileError: it is in neither place.
    """
    package = Path(__file__).parent
    for folder in (package / "tiny_r1_vl", package.parent / "examples" / "tiny_r1_vl"):
        if (folder / "model.safetensors").is_file():
            return folder
    raise FileError("the embedded model is not here; train it with: python examples/train_tiny_r1_vl.py")
