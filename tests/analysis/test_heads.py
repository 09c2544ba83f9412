"""Scores of heads against plain loops, and against models patched with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kit import tiny_encoders
from kit.grounding import (
    EVERYTHING,
    TOLERANCE,
    elbow_of,
    entropy_of,
    every,
    localisation_of,
    log_p_of,
    make_examples,
    make_inputs,
    media_of,
    scores_of,
)
from kit.tiny import HEADS, LAYERS, PAD, SEEING, make_model

from hf_steer import AttentionConfig, Saliency, SaliencyConfig, SteerConfig, get_steer_status, patch_model
from hf_steer.analysis import HeadExample, find_grounding_heads
from hf_steer.analysis.heads.batches import batches_of
from hf_steer.analysis.heads.candidates import measuring_strength
from hf_steer.analysis.heads.examples import resolve_examples
from hf_steer.analysis.heads.scores import PER_EXAMPLE, elbow, localisation, look, spatial_entropy
from hf_steer.patching import anatomy_of


@pytest.mark.parametrize(
    ("family", "implementation", "pictures"),
    [(*case, pictures) for case in EVERYTHING for pictures in (1, 2) if pictures == 1 or case[0] in SEEING],
)
def test_attention_scores_equal_plain_loops_over_eager_weights(family, implementation, pictures):
    make = tiny_encoders.make_encoder_model
    model, reference = make(family, implementation=implementation), make(family, implementation="eager")
    choosing = make_examples(family, 20, answer=False, pictures=pictures)
    report = make_examples(family, 20, first=100, answer=False, pictures=pictures)
    result = find_grounding_heads(model, choosing, report=report, rule="mass", count=2, null_sets=3, batch_size=8)
    expected = scores_of(reference, family, choosing)
    assert set(result.scores) == {*expected, *(() if family == "llava_onevision" else ("localisation",))}
    for name, table in expected.items():
        torch.testing.assert_close(np.array(result.scores[name]), table, **TOLERANCE)
    heads = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    assert list(result.rankings["mass"]) == sorted(heads, key=lambda place: -expected["mass"][place])
    assert result.chosen == result.rankings["mass"][:2]
    # the report, from the summed weights of the chosen heads
    hits = []
    for example in report:
        with torch.no_grad():
            attentions = reference(**example.inputs, output_attentions=True).attentions
        media = media_of(example.inputs)
        summed = [sum(float(attentions[layer][0, head, -1, key]) for layer, head in result.chosen) for key in media]
        hits.append(bool(example.span[media[summed.index(max(summed))]]))
    assert result.report.chosen.value == pytest.approx(np.mean(hits))
    shares = [float(example.span.sum()) / len(media_of(example.inputs)) for example in report]
    assert result.report.baseline == pytest.approx(np.mean(shares))


def test_spatial_entropy_equals_a_flood_fill():
    generator = torch.Generator().manual_seed(0)
    for grids in ([(1, 7, 5)], [(1, 1, 9)], [(1, 3, 4), (2, 2, 3)]):
        maps = torch.rand(3, 4, sum(f * h * w for f, h, w in grids), generator=generator, dtype=torch.float64) ** 3
        expected = [[entropy_of(own.tolist(), grids) for own in row] for row in maps]
        torch.testing.assert_close(spatial_entropy(maps, grids), torch.tensor(expected, dtype=torch.float64))


def test_spatial_entropy_of_drawn_maps():
    def entropy(*lines):
        grid = torch.tensor([[float(cell == "#") for cell in line] for line in lines], dtype=torch.float64)
        return float(spatial_entropy(grid.flatten(), [(1, *grid.shape)]))

    assert entropy("#....", ".#...", "..#..") == 0  # corners touch
    assert entropy("##..", "....", "..##") == pytest.approx(math.log(2))
    assert entropy("###.", "....", "...#") == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert entropy("######", ".....#", "######", "#.....", "######") == 0  # a long snake
    assert entropy("....", "....") == pytest.approx(math.log(8))  # constant


def test_localisation_votes_for_the_ten_most_compact_heads_over_the_elbow():
    random = np.random.default_rng(0)
    mass, entropies = random.random((6, 8)) ** 2, random.random((30, 6, 8)).round(1)  # rounded: some are equal
    votes = localisation(torch.tensor(mass), torch.tensor(entropies))
    torch.testing.assert_close(votes.numpy(), localisation_of(mass, entropies))
    assert votes.sum() == pytest.approx(PER_EXAMPLE)
    assert elbow(torch.tensor(mass).flatten()) == pytest.approx(elbow_of(mass.flatten().tolist()))
    assert elbow(torch.tensor([0.0, 0.1, 0.2, 0.3, 2.0])) == pytest.approx(0.3)


def test_prompts_with_padding_and_a_query_before_the_end_are_measured_where_they_say():
    model = make_model("qwen2_vl")
    plain = make_examples("qwen2_vl", 20, answer=False)
    moved = []
    for example in plain:
        length = example.inputs["input_ids"].shape[1]
        front, back = torch.full((1, 3), PAD), torch.full((1, 2), 7)
        inputs = dict(example.inputs)
        inputs["input_ids"] = torch.cat([front, inputs["input_ids"], back], 1)
        inputs["attention_mask"] = torch.cat([torch.zeros_like(front), inputs["attention_mask"], torch.ones_like(back)], 1)
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (3, 2))
        moved.append(HeadExample(inputs, torch.cat([torch.zeros(3, dtype=torch.bool), example.span]), query=length + 2))
    report = make_examples("qwen2_vl", 20, first=50, answer=False)
    own, padded = (find_grounding_heads(model, each, report=report, rule="mass", null_sets=2) for each in (plain, moved))
    for name in own.scores:
        torch.testing.assert_close(np.array(own.scores[name]), np.array(padded.scores[name]), **TOLERANCE)


def test_a_mask_counts_though_another_prompt_of_the_batch_has_none():
    model, ids = make_model("qwen2"), torch.arange(5, 17)[None]
    span = torch.zeros(12, dtype=torch.bool)
    span[7:9] = True
    masked = {"input_ids": ids, "attention_mask": (torch.arange(12) >= 4).long()[None]}
    rows = resolve_examples([HeadExample({"input_ids": ids}, span), HeadExample(masked, span)], anatomy_of(model))
    sites = anatomy_of(model).layers
    together, alone = ([own for _, _, own in look(model, batches_of(rows, size), "", sites=sites)] for size in (2, 1))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_boxes_and_their_tokens_are_one_span():
    model = make_model("qwen2_vl")
    boxed, marked = [], []
    for seed in range(20):
        inputs = make_inputs("qwen2_vl", seed)
        row, column = seed % 3, seed % 4
        box = (100 * column + 10, 100 * row, 100 * column + 95, 100 * row + 110)  # a little of the next row
        boxed.append(HeadExample(inputs, Saliency.from_boxes(box if row < 2 else (*box[:3], 300), (400, 300)), answer=5))
        span = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
        span[media_of(inputs)[4 * row + column]] = True
        marked.append(HeadExample(inputs, span, answer=5))
    report = make_examples("qwen2_vl", 20, first=50)
    results = [find_grounding_heads(model, each, report=report, rule="mass", null_sets=2) for each in (boxed, marked)]
    assert results[0] == results[1]


@every
def test_the_effect_of_a_head_is_that_of_a_model_patched_with_it(family, implementation):
    model = tiny_encoders.make_encoder_model(family, implementation=implementation)
    examples, report = make_examples(family, 20), make_examples(family, 20, first=100)
    result = find_grounding_heads(model, examples, report=report, rule="effect", count=2, strength=3.0, null_sets=2, batch_size=8)
    assert not get_steer_status(model).patched
    saliency = SaliencyConfig(source=None, normalize="none", preserve_mass=family in SEEING)

    def steered(heads, examples):
        config = SteerConfig(attention=AttentionConfig(heads=heads, strength=3.0, saliency=saliency, queries="all"))
        found = []
        for example in examples:
            statement = Saliency.from_tokens(example.span.float())
            if family in SEEING:
                statement = Saliency.from_mask(example.span[media_of(example.inputs)].view(3, 4))
            found.append(log_p_of(model, example, config, statement))
        return np.array(found)

    for layer, head in [(0, 1), (2, 3)]:
        with torch.no_grad():
            plain = [torch.log_softmax(model(**e.inputs).logits[0, -1].double(), -1)[e.answer].item() for e in examples]
        effect = (steered({layer: (head,)}, examples)[:, 0] - plain).mean()
        assert result.scores["effect"][layer][head] == pytest.approx(effect, rel=1e-3, abs=1e-5)
        assert abs(effect) > 1e-3
    assert result.report.chosen.value == pytest.approx(steered(result.heads, report)[:, 1].mean())


@pytest.mark.parametrize(("kept", "strength"), [(None, 32.0), (True, 32.0), (False, 4.0)])
def test_pictures_that_keep_their_mass_are_steered_harder_also_where_that_is_left_open(kept, strength):
    model = make_model("qwen2_vl")
    rows = resolve_examples(make_examples("qwen2_vl", 2), anatomy_of(model))
    assert measuring_strength(SaliencyConfig(source=None, preserve_mass=kept), rows) == strength


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_model_that_the_caller_patched_gives_the_same_and_stays_patched(pictures):
    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 40, pictures=pictures)
    own = find_grounding_heads(model, examples, null_sets=2, count=2)
    saliency = SaliencyConfig(source=None, normalize="none", preserve_mass=True)
    attention = AttentionConfig(heads="all", strength=0.5, saliency=saliency, queries="all")
    patch_model(model, SteerConfig(attention=attention))
    status = get_steer_status(model)
    assert find_grounding_heads(model, examples, null_sets=2, count=2) == own
    assert get_steer_status(model) == status


def test_the_scaling_of_saliency_can_be_chosen():
    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 40)
    kwargs = {"rule": "effect", "null_sets": 2, "strength": 2.0}
    kept = find_grounding_heads(model, examples, **kwargs)
    loose = SaliencyConfig(source=None, normalize="none", preserve_mass=False)
    free = find_grounding_heads(model, examples, saliency=loose, **kwargs)
    assert free.scores["mass"] == kept.scores["mass"]
    assert free.scores["effect"] != kept.scores["effect"]


def test_half_precision_models_are_measured_too():
    model = make_model("qwen2_vl")
    examples = make_examples("qwen2_vl", 40)
    whole = find_grounding_heads(model, examples, rule="effect", null_sets=2)
    half = find_grounding_heads(model.to(torch.bfloat16), examples, rule="effect", null_sets=2)
    for name in ("mass", "span_mass", "selectivity"):
        # bfloat16 keeps 8 bits: products of queries and keys of size 10 are off by 0.04, and so are weights, relatively
        torch.testing.assert_close(np.array(half.scores[name]), np.array(whole.scores[name]), rtol=0.1, atol=0.03)
    assert np.corrcoef(np.ravel(half.scores["effect"]), np.ravel(whole.scores["effect"]))[0, 1] > 0.9
