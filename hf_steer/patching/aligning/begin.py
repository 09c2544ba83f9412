"""How the aligners begin a pass: what their hooks, further in, cannot see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_steer.ground.arguments import Given
from hf_steer.patching.aligning.balancing import check_trainable, refuse_unlabelled
from hf_steer.patching.aligning.building import placeholders_in
from hf_steer.patching.passes import Pass


def begin_aligners(aligners: Any, current: Pass, given: Given) -> None:
    """Note whether a pass trains, whether pictures or sounds come with it, and which frames are real.

    Raises:
        PatchError: a training step could change nothing.
        AlignerError: a training step whose labels went another way.
    """
    if current.scope.off:
        return
    module, compiling = current.by, torch.compiler.is_compiling()
    learns = module.training and torch.is_grad_enabled()
    # features that the caller put among the embeddings are where the placeholders are
    among = given.ids is not None and given.embeds is not None
    current.perceives = given.perceives or (among and _holds_place(aligners, given.ids))
    current.trains = learns and given.labels is not None
    if learns and not current.trains and current.perceives:
        refuse_unlabelled(aligners, current.scope.balance)
    if current.trains and not compiling:
        check_trainable(aligners, module)
    current.balances = [] if current.trains else current.scope.balance
    listened = any(listener.follows_routing for listener in current.scope.listeners)
    current.aligns = current.trains or aligners.meets_text or current.balances is not None or listened
    frames = given.mel_mask if given.mel_mask is not None else _own_mask(aligners, given)
    current.frames = frames if isinstance(frames, Tensor) and frames.ndim == 2 else None


def _own_mask(aligners: Any, given: Given) -> Any:
    """The argument that says which frames are real, where this model has no other use for it."""
    names = [planned.encoder.mask for planned in aligners.plan.aligners if planned.encoder.mask is not None]
    return next((given.named.get(name) for name in names), None)


def _holds_place(aligners: Any, ids: Tensor) -> bool:
    """Whether features of any of the encoders stand among these tokens."""
    if torch.compiler.is_compiling():
        return aligners.meets_text  # type: ignore[no-any-return]
    return aligners.meets_text and any(bool(placeholders_in(ids, planned).any()) for planned in aligners.plan.aligners)


def real_frames(frames: Tensor | None, features: Tensor) -> Tensor | None:
    """Which of the encoder's frames `(rows, frames, features)` are real; None when nothing says so.

    A convolution of stride two makes frame t out of input 2t; a mean over two frames after it needs both.
    """
    if frames is None or features.ndim != 3 or frames.shape[0] != features.shape[0]:
        return None
    stride = frames.shape[1] // max(features.shape[1], 1)
    if stride < 1:
        return None
    mask = frames[:, max(0, stride - 2) :: stride][:, : features.shape[1]]
    return mask.bool() if mask.shape == features.shape[:2] else None
