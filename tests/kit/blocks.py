"""Blocks that change what steers a model with eyes, and what each of them gives."""

from __future__ import annotations

from kit.asking import logits, prompt, steered

from hf_steer import Saliency, disable_steering, use_saliency, use_strength


def box(number=0):
    return Saliency.from_boxes([(0, 0, 10, 10), (20, 10, 30, 20)][number], (30, 20))


BLOCKS = {
    "use_saliency": lambda model, number=0: use_saliency(model, box(number)),
    "use_strength": lambda model, number=0: use_strength(model, (1.0, -2.0)[number]),
    "disable_steering": lambda model, number=0: disable_steering(model),
}


class Subject:
    """A model that steers by its own eyes, and its logits for one prompt."""

    def __init__(self):
        self.model, self.inputs = steered("qwen2_vl"), prompt("qwen2_vl")
        self.usual = self.now()

    def now(self):
        return logits(self.model, self.inputs)

    def inside(self, name, number=0):
        """What a lone block of this kind gives."""
        with BLOCKS[name](self.model, number):
            return self.now()

    def block(self, name, number=0):
        return BLOCKS[name](self.model, number)
