"""Two published packages that steer attention, called as their own documents say, on models that share the plain one's weights.

pastalib (https://pypi.org/project/pastalib, PASTA's authors) hooks the attention modules of an eager Llama and edits a copy of
the mask in each; it knows only inside and outside of a span, so its λ is the same all over it. With `scale_position="exclude"`
and `alpha = exp(-λ)` everything outside the span gets -λ, which the softmax cannot tell from +λ inside.

nnsight (https://nnsight.net) intervenes on the inputs of the attention modules: it gives each the mask that the dense mask
contender gives the model, so it differs from that contender by what nnsight itself takes.
"""

from __future__ import annotations

import math
from typing import Any

from hf_steer.evidence.bench.decoder_calls import full_mask
from hf_steer.evidence.bench.decoder_stage import DecoderStage
from hf_steer.evidence.bench.scores import STRENGTH, image_span
from hf_steer.evidence.bench.timing import Call
from hf_steer.ground.arguments import named


def pasta(stage: DecoderStage) -> Call:
    """pastalib's context around the call; it is entered once per prompt."""
    from pastalib.pasta import PASTA

    cell, model = stage.cell, stage.twin("eager")
    steerer = PASTA(model, None, list(range(cell.layers)), alpha=math.exp(-STRENGTH), scale_position="exclude")
    (first, end), rows = image_span(cell.tokens), cell.batch
    # a character per token and a space between them: its own search then finds exactly the span's tokens
    text = " ".join("." * first + "#" * (end - first) + "." * (cell.keys - end))
    span = " ".join("#" * (end - first))
    offsets = [[(2 * token, 2 * token + 1) for token in range(cell.keys)]] * rows
    covered = named(ids=stage.ids.new_zeros(rows, cell.keys))  # it asks for their number only
    return stage.call(
        model, contexts=lambda: (steerer.apply_steering(model, [text] * rows, [[span] * rows], covered, offsets),)
    )


def nnsight(stage: DecoderStage) -> Call:
    """A trace per call, with an intervention in every layer."""
    from nnsight import NNsight

    model = stage.twin()
    traced = NNsight(model)

    def forward(**given: Any) -> Any:
        mask = full_mask(stage)
        with traced.trace(**given):
            for layer in traced.model.layers:
                layer.self_attn.inputs = ((), {**layer.self_attn.inputs[1], **named(mask=mask)})
            found = traced.output.save()
        return found

    return stage.call(model, forward=forward)
