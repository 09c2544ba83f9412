"""An aligner's module for its place in a model, and where the features that it steers stand in a prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_steer.aligners import build_aligner
from hf_steer.errors import AlignerError
from hf_steer.patching.passes import Pass
from hf_steer.patching.planned import PlannedAligner


def build_placed(planned: PlannedAligner) -> nn.Module:
    """In float32 beside a half-precision base, on the device of its encoder."""
    module = build_aligner(planned.config, planned.size, max(1, len(planned.layers)))
    dtype = next((p.dtype for p in planned.encoder.tower.parameters() if p.dtype.is_floating_point), torch.float32)
    return module.to(device_of(planned.encoder.outlet), torch.float64 if dtype == torch.float64 else torch.float32)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes; its parameters may lie on the meta device while accelerate holds them elsewhere."""
    for inner in module.modules():
        hook = vars(inner).get("_hf_hook")
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def laid_out_as(steered: Tensor, features: Tensor) -> Tensor:
    """The same numbers, in memory as the features were: kernels round by that, and a fresh aligner changes no bit."""
    if steered.shape != features.shape or steered.stride() == features.stride() or 0 in features.stride():
        return steered
    return torch.empty_strided(features.shape, features.stride(), dtype=steered.dtype, device=steered.device).copy_(steered)


def placeholders_in(ids: Tensor, planned: PlannedAligner) -> Tensor:
    """`(batch, tokens)` bool: where features of this encoder stand."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for token in planned.encoder.placeholder_ids:
        mask = mask | (ids == token)
    return mask


def refuse_pieces(current: Pass, mask: Tensor, past: int | Tensor) -> None:
    """AlignerError for a piece of a prompt, with features that experts are merged for, and more of the prompt to come.

    Args:
        current: the pass.
        mask: `(rows, tokens)` bool: where features stand in it.
        past: keys in the cache before it.
    """
    call = current.scope.call
    if torch.compiler.is_compiling() or call is None or call.ids is None:
        return
    if int(past) + mask.shape[1] < call.ids.shape[1] and bool(mask.any()):
        raise AlignerError("merge=True steers a sequence by the mean of all of it, and a piece came; leave out prefill_chunk_size.")
