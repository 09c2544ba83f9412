"""What cannot be had from layers that get their bias with their mask, and why."""

from __future__ import annotations

from hf_steer.config import AttentionConfig
from hf_steer.config.attention import AUTO
from hf_steer.errors import PatchError, say_once
from hf_steer.ground.implementations import implementation_of
from hf_steer.ground.parts import Anatomy

MASK = "mask"
"""How such layers get their bias, and the backend that does alike."""
IMPLEMENTATIONS = ("eager", "sdpa")
"""Whose masks are tensors that can be added to."""


def check_by_mask(attention: AttentionConfig, anatomy: Anatomy) -> None:
    """See that a gaze needs of such layers only what they have.

    Raises:
        PatchError: it reads attention weights, or the model runs an implementation whose masks are no tensors.
    """
    if anatomy.carried != MASK:
        return
    implementation = implementation_of(anatomy.decoder.config)
    if implementation not in IMPLEMENTATIONS:
        raise PatchError(
            f"{kind_of(anatomy)} gets its bias with its mask, and attention implementation {implementation!r} has none that it "
            "could be added to. Load the model with attn_implementation='eager'."
        )
    row = attention.saliency.row
    if row is not None and row.reads_heads:
        raise PatchError(
            f"saliency source {attention.saliency.source!r} reads attention weights. {why_unread(anatomy)} Take another source, or "
            "say where to look: SaliencyConfig(source=None) and use_saliency."
        )
    if attention.backend not in (AUTO, MASK):
        say_once(
            f"backend {attention.backend!r} gives way to {MASK!r}, with the same result: {kind_of(anatomy)} gets its bias with its "
            "mask alone."
        )


def refuse_unread(anatomy: Anatomy) -> None:
    """PatchError where what layers attend with is to be read, and cannot be."""
    if anatomy.carried == MASK:
        raise PatchError(f"{why_unread(anatomy)} Steering it works all the same.")


def why_unread(anatomy: Anatomy) -> str:
    """In words."""
    return f"{kind_of(anatomy)} calls no attention function that can be exchanged, so its queries and keys are not seen."


def kind_of(anatomy: Anatomy) -> str:
    """The class of its attention modules."""
    return type(anatomy.layers[0].module).__name__
