"""Heads that look into texts, and heads that look at what an encoder hands on: scores, effects and slopes, and the two stages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kit.crossing import make_crossing_model
from kit.grounding import TOLERANCE
from kit.marked import heard_places, loops_over, places_of, sound_examples, text_examples
from kit.tiny import HEADS, make_model

from hf_steer import (
    AttentionConfig,
    PatchError,
    Saliency,
    SaliencyConfig,
    get_steer_status,
    patch_model,
    unpatch_model,
    use_saliency,
)
from hf_steer.analysis import find_grounding_heads
from hf_steer.analysis.heads import find as finding
from hf_steer.testing.zoo import tiny_model

PLAIN = SaliencyConfig(source=None, normalize="none")


def text_model(family, implementation="sdpa"):
    return tiny_model("gpt2", implementation=implementation) if family == "gpt2" else make_model(family, implementation)


def most_of(family):
    return 60 if family == "gpt2" else 80


@torch.no_grad()
def weights_of(model, example, name="attentions"):
    """`(layers, heads, keys)` of the example's query."""
    return torch.stack([own[0, :, example.query] for own in getattr(model(**example.inputs, output_attentions=True), name)])


@pytest.mark.parametrize("among", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_of_texts_of_unequal_length_equal_plain_loops(family, among):
    """Rows are padded to go through together; GPT-2 counts positions, so padding at the wrong side would show."""
    choosing = text_examples(20, answer=False, most=most_of(family), among=among)
    report = text_examples(20, first=50, answer=False, most=most_of(family), among=among)
    result = find_grounding_heads(text_model(family), choosing, report=report, rule="mass", count=1, null_sets=2, batch_size=7)
    reference = text_model(family, "eager")
    tables = []
    for example in choosing:
        marked = set(example.span.nonzero().flatten().tolist())
        tables.append(loops_over(weights_of(reference, example), places_of(example), marked))
    for name, table in tables[0].items():
        expected = np.mean([own[name] for own in tables], 0)
        torch.testing.assert_close(np.array(result.scores[name]), expected, **TOLERANCE)
        assert table.std() > 0
    assert set(result.scores) == set(tables[0])


@torch.no_grad()
def log_p_of(model, example, config, statement):
    patch_model(model, config)
    with use_saliency(model, statement):
        logits = model(**example.inputs).logits[0, example.query].double()
    unpatch_model(model)
    return float(torch.log_softmax(logits, -1)[example.answer])


@torch.no_grad()
def plain_of(model, example):
    return float(torch.log_softmax(model(**example.inputs).logits[0, example.query].double(), -1)[example.answer])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_effect_of_a_head_in_texts_is_that_of_a_model_patched_with_it(family):
    model, examples = text_model(family), text_examples(20, most=most_of(family))
    report = text_examples(20, first=50, most=most_of(family))
    result = find_grounding_heads(model, examples, report=report, rule="effect", count=2, null_sets=2, batch_size=6)
    assert result.strength == 4.0
    assert (result.provenance.normalize, result.provenance.preserve_mass) == ("none", False)
    config = AttentionConfig(heads={1: (1,)}, strength=4.0, saliency=PLAIN, queries="all")
    said = [Saliency.from_tokens(example.span.float()) for example in examples]
    own = [log_p_of(model, example, config, each) - plain_of(model, example) for example, each in zip(examples, said, strict=True)]
    assert result.scores["effect"][1][1] == pytest.approx(np.mean(own), rel=1e-3, abs=1e-5)
    assert abs(np.mean(own)) > 1e-3
    assert not get_steer_status(model).patched


def test_scores_and_effects_across_are_those_of_cross_attention():
    model, reference = make_crossing_model("whisper"), make_crossing_model("whisper", "eager")
    choosing, report = sound_examples(20), sound_examples(20, first=40)
    result = find_grounding_heads(model, choosing, report=report, attends="cross", rule="effect", count=1, null_sets=2)
    tables = [
        loops_over(weights_of(reference, example, "cross_attentions"), list(range(50)), set(heard_places(example)))
        for example in choosing
    ]
    for name in tables[0]:
        torch.testing.assert_close(np.array(result.scores[name]), np.mean([own[name] for own in tables], 0), **TOLERANCE)
    config = AttentionConfig(heads={2: (3,)}, strength=result.strength, attends="cross",
                             saliency=SaliencyConfig(source=None, normalize="none", preserve_mass=True))  # fmt: skip
    own = [log_p_of(model, example, config, example.span) - plain_of(model, example) for example in choosing]
    assert result.scores["effect"][2][3] == pytest.approx(np.mean(own), rel=1e-3, abs=1e-5)
    assert abs(np.mean(own)) > 1e-4
    assert result.provenance.attends == "cross"


def test_a_model_that_is_patched_for_the_other_attention_is_refused():
    model = make_crossing_model("whisper")
    patch_model(model, AttentionConfig(heads="all", strength=1.0, attends="cross", saliency=PLAIN))
    examples = sound_examples(40)
    assert find_grounding_heads(model, examples, attends="cross", rule="mass", null_sets=2).provenance.attends == "cross"
    with pytest.raises(PatchError, match="patched to steer attends='cross', and heads of attends='self' are asked for"):
        find_grounding_heads(model, examples)


def test_slopes_are_the_effects_of_small_strengths_and_leave_no_gradients():
    model, examples = make_model("llama"), text_examples(20)
    report = text_examples(20, first=50)
    result = find_grounding_heads(model, examples, report=report, rule="slope", count=2, null_sets=2, batch_size=8)
    small = find_grounding_heads(model, examples, report=report, rule="effect", strength=1e-2, count=2, null_sets=2)
    effects = np.array(small.scores["effect"]) / 1e-2
    torch.testing.assert_close(np.array(result.scores["slope"]), effects, rtol=0.05, atol=2e-3)
    assert np.abs(effects).max() > 0.05
    assert result.chosen == result.rankings["slope"][:2]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_in_a_model_of_many_heads_the_steepest_are_steered_and_the_others_are_not(monkeypatch):
    model, examples = make_model("llama", num_hidden_layers=9), text_examples(40)
    steered = []
    plain = finding.measure

    def measure(*args):
        steered.append(tuple(args[3]))
        return plain(*args)

    monkeypatch.setattr(finding, "measure", measure)
    result = find_grounding_heads(model, examples, candidates=5, count=2, null_sets=3)
    assert result.rule == "effect"
    tried = {(layer, head) for layer, row in enumerate(result.scores["effect"]) for head, own in enumerate(row) if own is not None}
    slopes = np.array(result.scores["slope"])
    assert tried == {(int(place) // HEADS, int(place) % HEADS) for place in np.argsort(-slopes.ravel())[:5]}
    assert set(result.chosen) < tried
    assert set(result.rankings["effect"][:5]) == tried
    assert {heads[0] for heads in steered if len(heads) == 1} == tried
    assert "null" in result.to_json()
    assert len(repr(result)) < 400


def test_a_head_that_is_built_to_answer_is_found():
    """Layer 1, head 2 alone moves what comes out, since all other heads' outputs are cut off."""
    model = make_model("llama")
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight[:, [own for own in range(32) if (number, own // 8) != (1, 2)]] = 0
    result = find_grounding_heads(model, text_examples(40), candidates=3, count=1, null_sets=3)
    effects = np.array(result.scores["slope"])
    assert np.flatnonzero(np.abs(effects.ravel()) > 1e-9).tolist() == [1 * HEADS + 2]
