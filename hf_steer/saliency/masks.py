"""Masks as people have them: numbers 0 to 1, bytes 0 and 255, maps of labels, PIL pictures of any mode, files.

What could be read in two ways is refused with the reason: a wrong reading would steer somewhere, and nobody would see it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_steer.errors import SaliencyError
from hf_steer.saliency.checked import as_picture, finite
from hf_steer.saliency.paint import Picture
from hf_steer.saliency.picture_files import is_picture, open_upright, refuse_lying

if TYPE_CHECKING:
    from PIL import Image

WHITE = 255
_NAMED_LABELS = 12
"""Labels that an error lists, at most."""


def check_mask(mask: Any, label: int | Sequence[int] | None = None) -> Picture:
    """A mask as paint.

    Args:
        mask: numbers, a PIL picture, or the path of one.
        label: of a map of labels, the one or those that are meant.

    Raises:
        SaliencyError: another shape, values that are no mask's, or that may mean several things; a label that is not there.
        FileError: a path that is no picture's.
    """
    if isinstance(mask, (str, os.PathLike)):
        mask = open_upright(mask)
    if is_picture(mask):
        refuse_lying(mask)
        return as_picture("mask", _of_mode(mask, label))
    given = mask.detach().cpu() if isinstance(mask, Tensor) else torch.as_tensor(np.asarray(mask))
    whole = not given.is_floating_point() and given.dtype != torch.bool
    return as_picture("mask", _whole_numbers(given.to(torch.int64), label) if whole else _shares(given, label))


def _shares(given: Tensor, label: Any) -> Tensor:
    """Bools, or real numbers from 0 to 1."""
    if label is not None:
        raise SaliencyError(
            f"label={label!r} picks from a map of labels, which are whole numbers; this mask holds {given.dtype}. Leave label out, "
            "or give the map itself."
        )
    values = finite("mask", given)
    if values.numel() and (values.min() < 0 or values.max() > 1):
        raise SaliencyError(
            f"a mask must lie in [0, 1]; got {values.min():g} to {values.max():g}. For other scores use from_map; grey values are "
            "divided by 255."
        )
    return values


def _whole_numbers(given: Tensor, label: Any) -> Tensor:
    """Nothing but 0 and 1, nothing but 0 and 255, or labels."""
    if label is not None:
        return _labelled(given, label)
    used = torch.unique(given).tolist()
    if set(used) <= {0, 1} or set(used) <= {0, WHITE}:
        return (given > 0).to(torch.float32)
    raise SaliencyError(
        f"a mask must lie in [0, 1]; got {min(used)} to {max(used)}, {len(used)} different whole numbers that are not 0 and 255 "
        "alone. Labels, of which label= picks the one or those that are meant? Grey values, to be divided by 255? For other scores "
        "use from_map."
    )


def _labelled(given: Tensor, label: Any) -> Tensor:
    """Where a map of labels has one of those that are meant."""
    wanted = list(label) if isinstance(label, (list, tuple, set, range, np.ndarray)) else [label]
    if not wanted or not all(isinstance(own, (int, np.integer)) and not isinstance(own, bool) for own in wanted):
        raise SaliencyError(f"label= is a whole number, or several; got {label!r}.")
    used = torch.unique(given).tolist()
    missing = [int(own) for own in wanted if int(own) not in used]
    if missing:
        more = f" and {len(used) - _NAMED_LABELS} more" if len(used) > _NAMED_LABELS else ""
        there = ", ".join(str(own) for own in used[:_NAMED_LABELS])
        raise SaliencyError(f"label {', '.join(map(str, missing))} is not in this mask; it holds {there}{more}.")
    return torch.isin(given, torch.tensor([int(own) for own in wanted])).to(torch.float32)


def _of_mode(picture: Image.Image, label: Any) -> Tensor:
    """What a picture's mode says that its values are."""
    read = MODES.get(picture.mode)
    if read is None:
        raise SaliencyError(
            f"a mask has one value per pixel, and this picture of mode {picture.mode!r} has {len(picture.getbands())}: which of "
            f"them is meant? Give a picture of mode {', '.join(MODES)}, such as picture.convert('L') of one in black and white, or "
            "the pixels of one colour as an array of bools."
        )
    return read(picture, label)


def _values(picture: Image.Image) -> Tensor:
    return torch.as_tensor(np.array(picture))


def _grey(picture: Image.Image, label: Any) -> Tensor:
    """From black to white. A picture that is nowhere half white may hold labels instead."""
    values = _values(picture)
    brightest = int(values.max()) if values.numel() else 0
    if label is not None or brightest <= 1:
        return _whole_numbers(values, label)
    if brightest <= WHITE // 2:
        raise SaliencyError(
            f"this mask of mode 'L' is nowhere brighter than {brightest} of 255. Labels, of which label= picks the one or those "
            "that are meant? A faint mask, to be given as numbers from 0 to 1?"
        )
    return values.to(torch.float32) / WHITE


def _opaque(picture: Image.Image, label: Any) -> Tensor:
    """The alpha channel; colours are of no account."""
    alpha = _values(picture.getchannel(picture.getbands()[-1]))
    if label is not None:
        raise SaliencyError(f"label={label!r} picks from a map of labels; of a mask of mode {picture.mode!r} the alpha counts.")
    if not alpha.numel() or alpha.min() == alpha.max():
        same = int(alpha.max()) if alpha.numel() else 0
        raise SaliencyError(
            f"of a mask of mode {picture.mode!r} the alpha says where it is, and this one's is {same} everywhere. If its colours "
            "are the mask, give picture.convert('L')."
        )
    return alpha.to(torch.float32) / WHITE


def _palette(picture: Image.Image, label: Any) -> Tensor:
    """Numbers of colours: of two, of which one is 0 and no brighter than the other, that other; else labels."""
    numbers = _values(picture)
    if label is not None:
        return _labelled(numbers, label)
    used = torch.unique(numbers).tolist()
    hint = "Give label= with the one or those that are meant, or picture.convert('L') if the colours are black and white."
    if len(used) > 2 or (used and used[0] != 0):
        named = ", ".join(str(own) for own in used[:_NAMED_LABELS]) + (", ..." if len(used) > _NAMED_LABELS else "")
        raise SaliencyError(f"this mask of mode 'P' holds the colours {named} of its palette; which is the mask? {hint}")
    grey = _values(picture.convert("RGBA").convert("L"))
    if len(used) == 2 and grey[numbers == 0].max() > grey[numbers != 0].max():
        raise SaliencyError(f"in the palette of this mask colour 0 is brighter than colour {used[1]}; which is the mask? {hint}")
    return (numbers != 0).to(torch.float32)


MODES: Mapping[str, Callable[[Any, Any], Tensor]] = MappingProxyType(
    {
        "1": lambda picture, label: _shares(_values(picture), label),
        "L": _grey,
        "P": _palette,
        "I": lambda picture, label: _whole_numbers(_values(picture), label),
        "I;16": lambda picture, label: _whole_numbers(_values(picture).to(torch.int64), label),
        "F": lambda picture, label: _shares(_values(picture), label),
        **dict.fromkeys(("LA", "La", "PA", "RGBA", "RGBa"), _opaque),
    }
)
"""Mode of a PIL picture -> how it is read as a mask."""
