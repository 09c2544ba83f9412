"""Looking at attention changes nothing, and what is seen is what eager attention computes."""

from __future__ import annotations

import pytest
import torch
from kit.gazing import every, gaze, logits, looking, prompt_for, steer
from kit.tiny import HEADS, LAYERS, make_model

from hf_steer import patch_model
from hf_steer.attention import logits_in_chunks
from hf_steer.patching import anatomy_of, probe_attention


@torch.no_grad()
def probed(model, inputs, statement=None, *, layers=None, scores_per_chunk=64):
    """Layer -> attention weights `(batch, heads, queries, keys)`, with the bias where there is one."""
    seen = {}

    def read(call):
        parts = []
        for _, own, bias in logits_in_chunks(call, scores_per_chunk=scores_per_chunk):
            parts.append(torch.softmax(own if bias is None else own + bias, -1))
        seen[call.layer] = torch.cat(parts, 2)

    with probe_attention(model, read, layers=layers), looking(model, statement):
        output = model(**inputs).logits
    return seen, output


@every
@pytest.mark.parametrize("steered", [False, True])
def test_what_is_seen_is_what_eager_attention_computes(family, implementation, steered):
    inputs = prompt_for(family)
    model, reference = make_model(family, implementation), make_model(family, "eager")
    statement = None
    if steered:
        patch_model(model, steer(family)), patch_model(reference, steer(family))
        statement = gaze(family, inputs)
    configs = [site.module.config for site in anatomy_of(model).layers]
    before = logits(model, inputs, statement)
    seen, during = probed(model, inputs, statement)
    assert torch.equal(during, before)
    assert all(old is site.module.config for old, site in zip(configs, anatomy_of(model).layers, strict=True))
    with torch.no_grad(), looking(reference, statement):
        attentions = reference(**inputs, output_attentions=True).attentions
    assert sorted(seen) == list(range(LAYERS))
    real = inputs["attention_mask"].bool()
    for layer, weights in seen.items():
        assert weights.shape[1] == HEADS
        own, expected = weights.transpose(1, 2)[real], attentions[layer].transpose(1, 2)[real]
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_only_the_chosen_layers_are_seen_and_one_query_at_a_time_changes_nothing():
    model, inputs = make_model("qwen3"), prompt_for("qwen3")
    seen, _ = probed(model, inputs, layers=[1])
    assert list(seen) == [1]
    whole, _ = probed(model, inputs, scores_per_chunk=1 << 20)
    torch.testing.assert_close(seen[1], whole[1])
