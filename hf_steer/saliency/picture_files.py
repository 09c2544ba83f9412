"""Pictures upright, whoever opens them. A camera held sideways stores the picture as its sensor lay, and an EXIF tag that says so.

Who heeds the tag (tried on transformers 5.14 to 5.24 and qwen-vl-utils 0.0.14):
- a processor that is given an opened PIL picture does not, in any version: the model sees it lying;
- one that is given a path or an address does from 5.21 on. Before that only the slow ones do (`load_image`); those that decode with
  torchvision (`load_image_as_tensor`) hand the model a lying picture;
- `qwen_vl_utils.process_vision_info` does not, whatever it is given; it converts, resizes and leaves the tag where it is.
So every picture that we open is turned upright, which drops the tag, and an opened picture with the tag still on it is refused:
what its pixels say and what people see of it are two things.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from hf_steer.errors import FileError, SaliencyError

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112
TURNS = {
    2: "mirrored", 3: "upside down", 4: "upside down and mirrored", 5: "on its side and mirrored", 6: "on its left side",
    7: "on its side and mirrored", 8: "on its right side",
}  # fmt: skip


def open_upright(path: str | os.PathLike[str]) -> Image.Image:
    """A picture as people see it, in the mode of its file.

    Raises:
        FileError: no file, or none that Pillow reads.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return upright(file)
    except (OSError, UnidentifiedImageError) as error:
        raise FileError(
            f"{os.fspath(path)!r} cannot be read as a picture ({error}). Give a file in a format that Pillow reads."
        ) from error


def upright(picture: Image.Image) -> Image.Image:
    """A copy as people see it, without the tag."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture)


def is_picture(value: Any) -> TypeGuard[Image.Image]:
    """Whether this is a PIL picture; nothing is one before PIL is imported."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def refuse_lying(picture: Image.Image) -> None:
    """SaliencyError for an opened picture whose EXIF tag says that its pixels do not lie as people see them."""
    turn = TURNS.get(picture.getexif().get(ORIENTATION, 1))
    if turn is not None:
        raise SaliencyError(
            f"this PIL picture of {picture.size[0]} x {picture.size[1]} pixels lies {turn}, and its EXIF tag asks to turn it; "
            "processors do not, so the model would see it lying. Turn it once with PIL.ImageOps.exif_transpose(picture), and give "
            "what that returns to the processor and here. If its pixels are upright already, give (width, height), or a picture "
            "without the tag."
        )
