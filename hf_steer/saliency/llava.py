"""Which cuts a LLaVA makes of the pictures and videos in a call: of its arguments and its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from hf_steer.errors import SaliencyError
from hf_steer.ground import pictures
from hf_steer.ground.arguments import Given
from hf_steer.ground.parts import Anatomy
from hf_steer.saliency.cuts import Cut, Padded, Pooled, Whole, cut_in_parts

Cuts = dict[str, Sequence[Cut]]
"""Modality -> the cuts of all its pictures, or videos, in the batch, row by row, as processors list them."""


def whole_pictures(given: Given, anatomy: Anatomy, whole: bool) -> Cuts:
    """A square of patches each: for CLIP, whose processor cuts out the centre, and SigLIP, whose squashes the whole picture. The
    strategy "default" drops the first token.

    Raises:
        SaliencyError: another tower.
    """
    count = pictures.count_pictures(given, "image")
    if not count:
        return {}
    tower = pictures.kind_of(pictures.vision_of(anatomy))
    if tower not in pictures.CLASS_TOKENS:
        known = ", ".join(("pixtral", *pictures.CLASS_TOKENS))
        raise SaliencyError(
            f"where in a picture each token lies is known of LLaVA models with the towers {known}; this one's is "
            f"{tower!r}. Give one score per token with Saliency.from_tokens(...)."
        )
    ahead = pictures.CLASS_TOKENS[tower] - pictures.first_token(given, anatomy)
    return {"image": [Whole(pictures.square_of(anatomy), ahead, cropped=tower == "clip_vision_model")] * count}


def all_in_parts(given: Given, anatomy: Anatomy) -> Cuts:
    """Every picture whole and in parts, however many there are, and each patch a token (LLaVA-NeXT).

    Raises:
        SaliencyError: pictures came without their sizes.
    """
    if not pictures.pictures_came(given):
        return {}
    square, resolutions = pictures.square_of(anatomy), pictures.resolutions_of(anatomy)
    return {"image": [cut_in_parts(size, square, resolutions_px=resolutions) for size in pictures.sizes_in(given)]}


def pictures_and_parts(given: Given, anatomy: Anatomy, whole: bool) -> Cuts:
    """Pictures that are alone in their prompt come whole and in parts, others whole; videos in pooled frames.

    Args:
        given: arguments of the call.
        anatomy: of the model.
        whole: they are those of `generate`, which alone heeds another aspect ratio than the model's own.

    Raises:
        SaliencyError: pictures came without their sizes, or with another number of them.
    """
    square = pictures.square_of(anatomy)
    cuts: Cuts = {}
    if pictures.count_pictures(given, "image"):
        sizes = pictures.sizes_in(given)
        ratio, resolutions = pictures.aspect_ratio(given, anatomy, whole=whole), pictures.resolutions_of(anatomy)
        cuts["image"] = [
            cut_in_parts(size, square, resolutions_px=resolutions, aspect_ratio=ratio) if alone else Padded(size, square)
            for size, alone in zip(sizes, pictures.alone_in_prompt(given, len(sizes)), strict=True)
        ]
    if pictures.count_pictures(given, "video"):
        cuts["video"] = [Pooled(frames, square) for frames in pictures.frames_in(given, anatomy)]
    return cuts


CUTS: Mapping[str, Callable[[Given, Anatomy, bool], Cuts]] = MappingProxyType(
    {"whole": whole_pictures, "anyres": pictures_and_parts}
)
"""`Family.arrangement` -> how pictures are cut up."""
