"""What operations take up."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Bytes of what operations return, on any device but meta."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [out] if isinstance(out, torch.Tensor) else []
        self.bytes += sum(own.numel() * own.element_size() for own in tensors if not own.is_meta)
        return out
