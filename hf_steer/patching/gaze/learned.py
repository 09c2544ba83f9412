"""Strengths that are learned: one parameter per steered head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_steer.patching.planned import Plan


class LearnedStrengths(nn.Module):
    """λ per head as parameters, 0 at first; they learn through any backend, since the bias is an ordinary product with them."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.heads = {layer: tuple(h for h, on in enumerate(values) if on) for layer, values in plan.strengths.items()}
        sites = {site.index: site.module for site in plan.anatomy.layers}
        self.layers = nn.ParameterDict()
        for layer, heads in self.heads.items():
            device = next(sites[layer].parameters()).device
            # float32 whatever the model's dtype is: steps of an optimizer on λ would be lost in bfloat16
            self.layers[str(layer)] = nn.Parameter(torch.zeros(len(heads), dtype=torch.float32, device=device))
        self.num_heads = {layer: len(values) for layer, values in plan.strengths.items()}
        self.known: tuple[tuple[int, ...], bool] | None = None

    def strengths(self, device: torch.device) -> dict[int, Tensor]:
        """Layer -> λ `(query heads,)` float32, 0 for heads that are not steered; nothing while all are 0 and none learns."""
        if self._silent():
            return {}
        return {layer: self._spread(layer, heads).to(device) for layer, heads in self.heads.items()}

    def _spread(self, layer: int, heads: tuple[int, ...]) -> Tensor:
        own = self.layers[str(layer)].float()
        places = torch.tensor(heads, device=own.device)
        spread: Tensor = own.new_zeros(self.num_heads[layer]).index_put((places,), own)
        return spread

    def _silent(self) -> bool:
        """So that a fresh patch is bit-equal to no patch. The parameters are looked at once per change, not once per step."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        versions = tuple(parameter._version for parameter in self.layers.values())
        if self.known is None or self.known[0] != versions:
            self.known = (versions, not any(bool(parameter.any()) for parameter in self.layers.values()))
        return self.known[1]
