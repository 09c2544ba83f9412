"""Layers whose attention looks no function up: a hook adds their bias to the mask that they are called with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_steer.attention import add_to_mask, bias_over, on_device
from hf_steer.errors import SteerError
from hf_steer.ground.additive import Additive
from hf_steer.patching.edits import AddHook
from hf_steer.patching.gaze.receipt import heed_pass
from hf_steer.patching.passes import Pass
from hf_steer.patching.unchanged import Place
from hf_steer.values import HeadBias


class Masking(nn.Module):
    """The hooks on the steered attention modules of one model.

    Args:
        places: of these modules.
        sees: whether the model's own eyes steer it when nobody says anything.
        crosses: whether they attend to what an encoder hands on, all of which any token may see.
    """

    def __init__(self, places: Sequence[Place], *, sees: bool, crosses: bool) -> None:
        super().__init__()
        self.places, self.sees, self.crosses = tuple(places), sees, crosses

    def edits(self) -> Iterator[AddHook]:
        """All that is changed."""
        for place in self.places:
            site = place.site
            if site.takes is not None:
                yield AddHook(site.module, "before", partial(self.before_attention, site.index, site.takes))

    def before_attention(
        self, layer: int, takes: Additive, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Attention: its mask with the bias of this pass; untouched where there is none.

        Raises:
            PatchError: it runs outside of any pass, and was to be steered.
            SteerError: it sees other keys than the saliency covers, or has no mask over several queries.
        """
        passing = heed_pass(module, kwargs, sees=self.sees)
        bias = None if passing is None else passing.biases.get(layer)
        if passing is None or bias is None:
            return None
        states = next(own for own in (*args, *kwargs.values()) if isinstance(own, Tensor) and own.is_floating_point())
        added = takes.added(args, kwargs, partial(self._merge, passing, layer, bias, states))
        passing.signed.add(layer)
        return added

    def _merge(self, passing: Pass, layer: int, bias: HeadBias, states: Tensor, mask: Tensor | None) -> Tensor:
        """A mask, or none, with the bias of a layer whose inputs are `states`."""
        queries = 1 if passing.bias_of is None else passing.bias_of.queries
        if mask is None and queries > 1 and not self.crosses:
            raise SteerError(
                f"layer {layer} is called for {queries} tokens without a mask, so which of them may see which is not known. Give "
                "the model an attention mask, or run inside disable_steering(model)."
            )
        if mask is not None:
            bias = bias_over(passing, layer, bias, mask.shape[-1])
        device = states.device if mask is None else mask.device
        if bias.key.device != device:
            bias = on_device(bias, device)
        dtype = mask.dtype if mask is not None and mask.is_floating_point() else states.dtype
        return add_to_mask(bias, mask, dtype).expand(-1, -1, queries, -1)


def takes_bias_by_mask(module: nn.Module) -> bool:
    """Whether a hook of a patched model is on a module already."""
    hooks = (getattr(hook, "func", None) for hook in module._forward_pre_hooks.values())
    return any(isinstance(getattr(method, "__self__", None), Masking) for method in hooks)
