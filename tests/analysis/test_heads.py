"""Grounding heads: scores against plain loops, sets against models patched with them, and claims with their controls."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from kit import tiny_encoders
from kit.tiny import HEADS, IMAGE, IMPLEMENTATIONS, LAYERS, PAD, SEEING, VIDEO, make_model, make_prompt, pad_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_steer import (
    AttentionConfig,
    ConfigError,
    GateConfig,
    PatchError,
    Saliency,
    SaliencyConfig,
    SaliencyError,
    SteerConfig,
    get_steer_status,
    patch_model,
    unpatch_model,
    use_saliency,
)
from hf_steer.analysis import HeadExample, HeadResult, find_grounding_heads
from hf_steer.analysis.heads import RULES
from hf_steer.analysis.heads import find as finding
from hf_steer.analysis.heads.jsonl import read_jsonl
from hf_steer.analysis.heads.report import bootstrap, make_report, random_sets
from hf_steer.analysis.heads.scores import PER_EXAMPLE, elbow, localisation, spatial_entropy
from hf_steer.analysis.heads.selection import Answers, grow
from hf_steer.cli import heads as heads_command
from hf_steer.cli import main
from hf_steer.embedded import embedded_model_dir
from hf_steer.evidence import digits
from hf_steer.evidence.scenes import digit_examples
from hf_steer.patching import anatomy_of

LISTENING = {"qwen2_audio": 10, "voxtral": 5}
LOOKING = {"llava": 9, "llava_onevision": 30}
"""LLaVAs -> tokens of a picture; above, of a sound. OneVision's, crops and newlines among them, form no one grid."""
EVERYTHING = [(family, implementation) for family in (*SEEING, *LISTENING, *LOOKING) for implementation in IMPLEMENTATIONS]
every = pytest.mark.parametrize(("family", "implementation"), EVERYTHING)
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""Two kernels with other orders of summation, three layers of fp32."""


def make_inputs(family, seed, *, pictures=1, tail=4):
    """One row: a picture of 3 x 4 tokens, two of them and a video, or a sound; its last `tail` tokens are text."""
    if family in SEEING:
        items = [("image", 3, 4)] if pictures == 1 else [("image", 2, 3), 2, ("video", 2, 2, 2), 1, ("image", 3, 2)]
        return make_prompt(family, [[3, *items, tail]], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    count = {**LISTENING, **LOOKING}[family]
    words = torch.randint(2, 80, (3 + tail,), generator=generator).tolist()
    inputs = pad_rows([[*words[:3], *[IMAGE] * count, *words[3:]]], padding="left")
    if family in LISTENING:
        inputs["input_features"] = torch.randn(1, tiny_encoders.MELS, 2 * tiny_encoders.FRAMES, generator=generator)
    if family == "qwen2_audio":
        inputs["feature_attention_mask"] = torch.ones(1, 2 * tiny_encoders.FRAMES, dtype=torch.long)
    if family == "llava":
        inputs["pixel_values"] = torch.randn(1, 3, 12, 12, generator=generator)
    if family == "llava_onevision":
        inputs["pixel_values"] = torch.randn(1, 3, 3, 12, 12, generator=generator)
        inputs["image_sizes"] = torch.tensor([[12, 24]])
    return inputs


def media_of(inputs):
    ids = inputs["input_ids"][0]
    return [*(ids == IMAGE).nonzero().flatten().tolist(), *(ids == VIDEO).nonzero().flatten().tolist()]


def make_example(family, seed, *, answer=True, **kwargs):
    inputs = make_inputs(family, seed, **kwargs)
    random = np.random.default_rng(seed)
    media = media_of(inputs)
    span = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
    span[random.choice(media, int(random.integers(1, 4)), replace=False)] = True
    return HeadExample(inputs, span, answer=int(random.integers(2, 80)) if answer else None)


def make_examples(family, count, *, first=0, **kwargs):
    """Prompts of two lengths, so that they do not all fit into one batch."""
    return [make_example(family, first + number, tail=4 + number % 2, **kwargs) for number in range(count)]


def grids_of(family, inputs):
    """Frames, height and width of the pictures in tokens, images before videos; a sound is a line."""
    if family == "llava":
        return [(1, 3, 3)]
    if family not in SEEING:
        return [(1, 1, LISTENING[family])]
    sizes = [inputs[name].tolist() for name in ("image_grid_thw", "video_grid_thw") if name in inputs]
    return [(frames, height // 2, width // 2) for size in sizes for frames, height, width in size]


# Plain loops, fp64.


def components_of(cells):
    """Sets of 8-connected cells, by flood fill."""
    left, found = set(cells), []
    while left:
        stack, own = [left.pop()], set()
        while stack:
            row, column = stack.pop()
            own.add((row, column))
            for near in [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    stack.append(near)
        found.append(own)
    return found


def entropy_of(values, grids):
    mean = sum(values) / len(values)
    weights, start = [], 0
    for frames, height, width in grids:
        for _ in range(frames):
            frame = values[start : start + height * width]
            over = [(place, value - mean) for place, value in enumerate(frame) if value > mean * (1 + 1e-6)]
            above = {(place // width, place % width): excess for place, excess in over}
            weights += [sum(above[cell] for cell in own) for own in components_of(above)]
            start += height * width
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights) if weights else math.log(len(values))


def scores_of(model, family, examples):
    """The attention scores from the weights that eager attention returns."""
    sums, entropies = {}, np.zeros((len(examples), LAYERS, HEADS))
    for number, example in enumerate(examples):
        with torch.no_grad():
            attentions = model(**example.inputs, output_attentions=True).attentions
        media, marked = media_of(example.inputs), set(example.span.nonzero().flatten().tolist())
        for layer in range(LAYERS):
            for head in range(HEADS):
                weights = [float(attentions[layer][0, head, example.query, key]) for key in media]
                on = sum(w for w, key in zip(weights, media, strict=True) if key in marked)
                off = sum(weights) - on
                values = {
                    "mass": on + off,
                    "span_mass": on,
                    "selectivity": on - off / (len(media) - len(marked)) * len(marked),
                    "pointing": float(media[weights.index(max(weights))] in marked),
                }
                for name, value in values.items():
                    sums.setdefault(name, np.zeros((LAYERS, HEADS)))[layer, head] += value / len(examples)
                if family != "llava_onevision":
                    entropies[number, layer, head] = entropy_of(weights, grids_of(family, example.inputs))
    return sums if family == "llava_onevision" else {**sums, "entropy": entropies.mean(0)}


def elbow_of(values):
    curve = sorted(values)
    last = len(curve) - 1
    distance = []
    for place, value in enumerate(curve):
        across, up = last, curve[-1] - curve[0]  # the chord, from the first point
        distance.append(abs(across * (value - curve[0]) - up * place) / math.hypot(across, up))
    return curve[distance.index(max(distance))]


def localisation_of(mass, entropies):
    heads = [(layer, head) for layer in range(mass.shape[0]) for head in range(mass.shape[1])]
    over = [place for place in heads if mass[place] >= elbow_of(mass.flatten().tolist())]
    votes = np.zeros(mass.shape)
    for table in entropies:
        for place in sorted(over, key=lambda place: (table[place], -mass[place]))[:10]:
            votes[place] += 1 / len(entropies)
    return votes


# Attention.


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


# Steering.


def log_p_of(model, example, config, statement):
    patch_model(model, config)
    try:
        with torch.no_grad(), use_saliency(model, statement):
            logits = model(**example.inputs).logits[0, example.query].double()
    finally:
        unpatch_model(model)
    return float(torch.log_softmax(logits, -1)[example.answer]), int(logits.argmax() == example.answer)


@every
def test_the_effect_of_a_head_is_that_of_a_model_patched_with_it(family, implementation):
    model = tiny_encoders.make_encoder_model(family, implementation=implementation)
    examples, report = make_examples(family, 20), make_examples(family, 20, first=100)
    result = find_grounding_heads(model, examples, report=report, rule="effect", count=2, strength=3.0, null_sets=2, batch_size=8)
    assert not get_steer_status(model).patched
    saliency = SaliencyConfig(source=None, preserve_mass=True)

    def steered(heads, examples):
        config = SteerConfig(attention=AttentionConfig(heads=heads, strength=3.0, saliency=saliency))
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


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_model_that_the_caller_patched_gives_the_same_and_stays_patched(pictures):
    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 40, pictures=pictures)
    own = find_grounding_heads(model, examples, null_sets=2, count=2)
    attention = AttentionConfig(heads="all", strength=0.5, saliency=SaliencyConfig(source=None, preserve_mass=True))
    patch_model(model, SteerConfig(attention=attention))
    status = get_steer_status(model)
    assert find_grounding_heads(model, examples, null_sets=2, count=2) == own
    assert get_steer_status(model) == status


def test_the_scaling_of_saliency_can_be_chosen():
    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 40)
    kwargs = {"rule": "effect", "null_sets": 2, "strength": 2.0}
    kept = find_grounding_heads(model, examples, **kwargs)
    free = find_grounding_heads(model, examples, saliency=SaliencyConfig(source=None, preserve_mass=False), **kwargs)
    assert free.scores["mass"] == kept.scores["mass"]
    assert free.scores["effect"] != kept.scores["effect"]


def answers(right, log_p=0.0):
    return Answers(torch.tensor(right, dtype=torch.float64), torch.full((len(right),), log_p, dtype=torch.float64))


def test_forward_selection_takes_heads_that_complete_each_other():
    # which of six examples each head gets right; a set gets right what one of its heads does
    gets = {(0, 0): {0, 1, 2, 3}, (0, 1): {0, 1, 2}, (1, 0): {0, 1, 2}, (1, 1): {4, 5}, (2, 0): {4}}

    def measure(heads):
        own = set().union(*(gets[head] for head in heads))
        return answers([float(number in own) for number in range(6)], log_p=-float(sum(layer for layer, _ in heads)))

    singles = {head: measure([head]) for head in gets}
    chosen, reached = grow(measure, singles, count=3, shortlist=5)
    assert chosen == [(0, 0), (1, 1), (0, 1)]  # the last ties with the others in its share, and wins by log p
    assert reached[1, 1].merit[0] == 1.0
    assert grow(measure, singles, count=2, shortlist=3)[0] == [(0, 0), (0, 1)]
    assert set(grow(measure, singles, count=2, shortlist=3)[1]) == {(0, 0), (0, 1), (1, 0)}


def test_heads_off_the_short_list_have_no_forward_score_and_come_last():
    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 40)
    result = find_grounding_heads(model, examples, count=2, shortlist=3, null_sets=2)
    tried = [(layer, head) for layer in range(LAYERS) for head in range(HEADS) if result.scores["forward"][layer][head] is not None]
    assert len(tried) == 3
    assert set(result.rankings["forward"][:3]) == set(tried)
    assert len(set(result.rankings["forward"])) == LAYERS * HEADS


# The report.


def test_random_sets_are_all_different_as_large_and_never_the_chosen_one():
    chosen = [(1, 0), (1, 2), (3, 4)]
    for same_layers in (True, False):
        sets = random_sets(chosen, (4, 6), 30, np.random.default_rng(0), same_layers=same_layers)
        assert len(set(sets)) == len(sets) == 30
        assert tuple(sorted(chosen)) not in sets
        assert all(len(set(own)) == 3 for own in sets)
        if same_layers:
            assert all([layer for layer, _ in own] == [1, 1, 3] for own in sets)
        else:
            assert {layer for own in sets for layer, _ in own} == {0, 1, 2, 3}
    few = random_sets([(1, 0), (1, 2)], (4, 6), 100, np.random.default_rng(0), same_layers=True)
    assert set(few) == {((1, a), (1, b)) for a, b in combinations(range(6), 2)} - {((1, 0), (1, 2))}
    assert random_sets([(1, head) for head in range(6)], (4, 6), 5, np.random.default_rng(0), same_layers=True) == []


def test_the_bootstrap_interval_is_that_of_the_normal_approximation_for_many_examples():
    values = torch.tensor(np.random.default_rng(0).normal(0.3, 1.0, 2000))
    estimate = bootstrap(values, np.random.default_rng(1))
    error = 1.959964 * float(values.std()) / math.sqrt(2000)
    assert estimate.value == pytest.approx(float(values.mean()))
    # 5000 resamples know the ends of the interval to about 2 % of its half width; 4 standard errors
    assert estimate.low == pytest.approx(estimate.value - error, abs=0.08 * error)
    assert estimate.high == pytest.approx(estimate.value + error, abs=0.08 * error)
    assert bootstrap(torch.ones(20, dtype=torch.float64), np.random.default_rng(1)).low == 1.0


def report_of(chosen_share, other_share, baseline_share, heads=((1, 0), (1, 2)), anywhere=None):
    """A report on 200 examples of which the given shares are right."""

    def rights(share):
        return (torch.arange(200) < 200 * share).double()

    def hits(sets):
        shares = [other_share if all(layer == 1 for layer, _ in own) else anywhere or other_share for own in sets[1:]]
        return torch.stack([rights(share) for share in (chosen_share, *shares)])

    return make_report("answers", hits, rights(baseline_share), chosen=list(heads), shape=(4, 6), null_sets=10, seed=0)


def test_the_verdict_needs_a_gain_over_random_heads_and_over_the_baseline():
    found = report_of(0.9, 0.6, 0.3)
    assert found.reason is None
    assert found.over_same_layers.value == pytest.approx(0.3)
    assert found.over_baseline.value == pytest.approx(0.6)
    assert found.same_layers == pytest.approx((0.6,) * 10)
    assert found.over_same_layers.low < 0.3 < found.over_same_layers.high
    assert "random heads of the same layers, 0.00 [0.00, 0.00], is not above 0" in report_of(0.6, 0.6, 0.3).reason
    assert "the layers matter" in report_of(0.9, 0.9, 0.3, anywhere=0.5).reason
    assert "gain over the unsteered model, -0.05" in report_of(0.9, 0.6, 0.95).reason
    whole = report_of(0.9, 0.6, 0.3, heads=[(1, head) for head in range(6)])
    assert whole.over_same_layers is None
    assert "no others to compare them with" in whole.reason


# Claims and controls.


@pytest.fixture(scope="module")
def embedded():
    return AutoModelForImageTextToText.from_pretrained(embedded_model_dir()).eval()


@pytest.fixture(scope="module")
def held_out():
    return digit_examples(embedded_model_dir(), "held-out", 300, seed=202)


@pytest.fixture(scope="module")
def found(embedded, held_out):
    """Heads chosen on training digits, reported on held-out ones."""
    examples = digit_examples(embedded_model_dir(), "training", 200, seed=11)
    return find_grounding_heads(embedded, examples, report=held_out, null_sets=10)


def test_four_heads_steer_what_all_do_and_random_ones_do_not(found):
    report = found.report
    assert found.rule == "forward"
    assert found.found, found.verdict
    assert len(found.chosen) == 4
    assert report.chosen.value >= 0.85
    assert report.baseline <= 0.35
    assert np.mean(report.all_heads) <= report.chosen.value - 0.2
    assert np.mean(report.same_layers) < report.chosen.value
    assert report.over_same_layers.low > 0


def test_the_heads_of_a_result_go_straight_into_a_configuration(found, tmp_path):
    again = HeadResult.from_json(found.to_json())
    assert again == found
    path = found.save(tmp_path / "new" / "heads.json")
    assert [file.name for file in path.parent.iterdir()] == ["heads.json"]
    values = json.loads(path.read_text())
    wanted = AttentionConfig(heads=found.heads)
    assert AttentionConfig(heads=again.heads) == AttentionConfig(heads=values["heads"]) == wanted
    assert values["verdict"] == "found"
    assert sum(map(len, wanted.heads.values())) == 4
    lines = found.to_csv().splitlines()
    assert lines[0].startswith("layer,head,chosen,mass,")
    assert len(lines) == 1 + 4 * 6
    assert sum(line.split(",")[2] == "1" for line in lines) == 4
    text = str(found)
    for piece in ("found", str(found.heads), "random heads, as many in the same layers", "forward"):
        assert piece in text


def test_a_result_that_was_tampered_with_is_refused(found):
    values = json.loads(found.to_json())
    for change, message in (
        ({"hed": 1}, r"unknown \['hed'\]"),
        ({"heads": {"0": [1]}}, "not the chosen ones"),
        ({"report": {**values["report"], "p_value": 0.01}}, r"report: missing \[\], unknown \['p_value'\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            HeadResult.from_json(json.dumps({**values, **change}))
    del values["chosen"]
    with pytest.raises(ConfigError, match=r"missing \['chosen'\]"):
        HeadResult.from_json(json.dumps(values))
    with pytest.raises(ConfigError, match="not JSON"):
        HeadResult.from_json(found.to_json()[:-20])


def test_shuffled_spans_find_no_heads(embedded):
    folder = embedded_model_dir()
    examples = digit_examples(folder, "training", 60, seed=3, shuffled=True)
    report = digit_examples(folder, "held-out", 100, seed=4, shuffled=True)
    result = find_grounding_heads(embedded, examples, report=report, rule="effect", null_sets=5)
    assert result.verdict.startswith("none found")
    assert result.report.chosen.value < 0.4


@pytest.fixture(scope="module")
def asked():
    """Questions that name the cell; the model looks there to answer."""
    folder = embedded_model_dir()
    return digit_examples(folder, "training", 60, seed=1, asked=True), digit_examples(folder, "held-out", 80, seed=2, asked=True)


def test_without_answers_heads_that_point_where_the_question_says_are_found(embedded, asked):
    examples, report = asked
    result = find_grounding_heads(embedded, examples, report=report, rule="pointing", count=1)
    assert result.found, result.verdict
    assert result.report.measure == "pointing"
    assert result.report.chosen.value >= 0.95
    assert result.report.baseline == 0.25
    assert np.mean(result.report.all_heads) <= 0.7
    default = find_grounding_heads(embedded, examples, report=report, count=1)
    assert default.rule == "selectivity"
    assert default.heads == result.heads


@pytest.mark.parametrize("seed", range(4))
def test_without_answers_shuffled_spans_find_no_heads(embedded, asked, seed):
    random = np.random.default_rng(seed)
    shuffled = [[part[number].span for number in random.permutation(len(part))] for part in asked]
    examples, report = (
        [HeadExample(example.inputs, span) for example, span in zip(part, spans, strict=True)]
        for part, spans in zip(asked, shuffled, strict=True)
    )
    result = find_grounding_heads(embedded, examples, report=report, rule="pointing", seed=seed)
    assert result.verdict.startswith("none found")


@pytest.mark.parametrize("seed", range(4))
def test_an_untrained_model_has_no_grounding_heads(seed):
    model = make_model("qwen2_vl", seed=seed)
    examples = make_examples("qwen2_vl", 80, first=1000 * seed, answer=False)
    assert find_grounding_heads(model, examples, rule="pointing", count=2, seed=seed).verdict.startswith("none found")
    # answers that the model gives now and then, whatever it looks at: one of its two most probable tokens
    random = np.random.default_rng(seed)
    answered = []
    for example in examples:
        with torch.no_grad():
            likely = model(**example.inputs).logits[0, -1].topk(2).indices.tolist()
        answered.append(HeadExample(example.inputs, example.span, likely[random.integers(2)]))
    result = find_grounding_heads(model, answered, count=2, seed=seed, null_sets=5)
    assert 0.2 < result.report.baseline < 0.8
    assert result.verdict.startswith("none found")


def test_the_same_seed_gives_the_same_result_and_the_parts_do_not_overlap():
    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 50, answer=False)
    first, again = (find_grounding_heads(model, examples, report_fraction=0.4, seed=3, null_sets=3) for _ in range(2))
    assert first == again
    assert (first.examples, first.report.examples) == (30, 20)
    assert find_grounding_heads(model, examples, report_fraction=0.4, seed=4, null_sets=3).scores != first.scores


def test_half_precision_models_are_measured_too():
    model = make_model("qwen2_vl")
    examples = make_examples("qwen2_vl", 40)
    whole = find_grounding_heads(model, examples, rule="effect", null_sets=2)
    half = find_grounding_heads(model.to(torch.bfloat16), examples, rule="effect", null_sets=2)
    for name in ("mass", "span_mass", "selectivity"):
        # bfloat16 keeps 8 bits: products of queries and keys of size 10 are off by 0.04, and so are weights, relatively
        torch.testing.assert_close(np.array(half.scores[name]), np.array(whole.scores[name]), rtol=0.1, atol=0.03)
    assert np.corrcoef(np.ravel(half.scores["effect"]), np.ravel(whole.scores["effect"]))[0, 1] > 0.9


# The model afterwards, and bad input.


def state_of(model, example):
    with torch.no_grad():
        logits = model(**example.inputs).logits
    return logits, [site.module.config for site in anatomy_of(model).layers], dict(vars(model)), list(model.state_dict())


@every
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was_also_when_the_search_is_interrupted(family, implementation, fails, monkeypatch):
    model = tiny_encoders.make_encoder_model(family, implementation=implementation)
    examples = make_examples(family, 40)
    before = state_of(model, examples[0])
    if fails:

        def interrupt(*args, **kwargs):
            assert get_steer_status(model).patched
            raise KeyboardInterrupt

        monkeypatch.setattr(finding, "make_report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            find_grounding_heads(model, examples, rule="mass", null_sets=2)
    else:
        find_grounding_heads(model, examples, rule="mass", null_sets=2)
    after = state_of(model, examples[0])
    assert torch.equal(before[0], after[0])
    assert all(old is new for old, new in zip(before[1], after[1], strict=True))
    assert before[2:] == after[2:]


def with_inputs(example, **changes):
    return HeadExample({**example.inputs, **changes}, example.span, example.answer, example.query)


def with_span(example, span):
    return HeadExample(example.inputs, span, example.answer, example.query)


def text_span(example):
    span = torch.zeros_like(example.span)
    span[0] = True
    return span


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda e: with_span(e, torch.zeros_like(e.span)), SaliencyError, "example 7: its span marks 0 tokens"),
        (lambda e: with_span(e, text_span(e)), SaliencyError, "example 7: its span marks 1 tokens, 1 of them outside the 12"),
        (lambda e: with_span(e, e.inputs["input_ids"][0] == IMAGE), SaliencyError, "marks 12 tokens.*some of these and not all"),
        (lambda e: with_span(e, torch.ones(99, dtype=torch.bool)), SaliencyError, "covers 99 tokens; the prompt has"),
        (lambda e: with_span(e, e.span.float()), SaliencyError, "a span is a bool tensor"),
        (lambda e: with_span(e, Saliency.from_boxes((0, 0, 5, 5), (10, 10), row=1)), SaliencyError, "no image 0 in row 1"),
        (lambda e: with_inputs(e, input_ids=e.inputs["input_ids"].clamp(max=80)), SaliencyError, "example 7: image token count"),
        (
            lambda e: HeadExample(make_prompt("qwen2_vl", [[9]]), torch.ones(9, dtype=torch.bool), 5), SaliencyError,
            "example 7: its prompt has no image or video token",
        ),
        (lambda e: with_inputs(e, input_ids=e.inputs["input_ids"].repeat(2, 1)), ConfigError, r"one row.*shape \(2, "),
        (lambda e: with_inputs(e, pixel_values=[1.0]), ConfigError, r"\['pixel_values'\] are not tensors"),
        (lambda e: HeadExample({}, e.span, 5), ConfigError, "no input_ids"),
        (lambda e: HeadExample(e.inputs, e.span, 96), ConfigError, "answer=96 is not a token id; the vocabulary has 96, 0 to 95"),
        (lambda e: HeadExample(e.inputs, e.span, -1), ConfigError, "answer=-1 is not a token id"),
        (lambda e: HeadExample(e.inputs, e.span, None), ConfigError, "39 of 40 examples have an answer"),
        (lambda e: HeadExample(e.inputs, e.span, 5, query=99), ConfigError, "query=99 is not one of the prompt's"),
        (lambda e: HeadExample(e.inputs, e.span, 5, query=2), ConfigError, "query=2 comes before the last vision or audio token"),
        (lambda e: dict(e.inputs), ConfigError, "HeadExample objects; got dict"),
    ],
)  # fmt: skip
def test_examples_that_do_not_fit_are_named_and_the_model_is_not_touched(change, error, message):
    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 40)
    examples[7] = change(examples[7])
    with pytest.raises(error, match=message):
        find_grounding_heads(model, examples)
    assert not get_steer_status(model).patched


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"count": 13}, r"count=13 is more heads than.*the model has 12, 4 in each of 3 layers"),
        ({"count": 0}, "count must be a whole number of at least 1"),
        ({"count": 4, "shortlist": 3}, "count=4 is more heads than.*shortlist=3"),
        ({"rule": "best"}, "rule must be one of 'forward', 'mass'"),
        ({"strength": 0.0}, "strength must not be 0"),
        ({"strength": float("nan")}, "strength must be a finite number"),
        ({"report_fraction": 1.0}, "report_fraction must lie between 0 and 1"),
        ({"report_fraction": 0.1}, "too few examples: 36 to choose with, 4 to report on; it takes at least 20 of each"),
        ({"null_sets": 0}, "null_sets must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"report": []}, "too few examples: 40 to choose with, 0"),
        ({"saliency": SaliencyConfig()}, "with source=None"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kwargs, message):
    model = make_model("qwen2_vl")
    with pytest.raises(ConfigError, match=message):
        find_grounding_heads(model, make_examples("qwen2_vl", 40), **kwargs)
    assert not get_steer_status(model).patched


def test_calls_that_cannot_be_answered_say_why():
    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 40)
    with pytest.raises(ConfigError, match="there are no examples"):
        find_grounding_heads(model, [])
    with pytest.raises(ConfigError, match="both examples and report"):
        find_grounding_heads(model, examples, report=examples[:20])
    with pytest.raises(ConfigError, match="rule 'effect' needs examples with answers"):
        find_grounding_heads(model, make_examples("qwen2_vl", 40, answer=False), rule="effect")
    with pytest.raises(SaliencyError, match="'llama' has no vision or audio tokens"):
        find_grounding_heads(make_model("llama"), [HeadExample(pad_rows([[5, 6, 7]], padding="left"), torch.ones(3).bool())] * 40)
    onevision = tiny_encoders.make_encoder_model("llava_onevision")
    with pytest.raises(ConfigError, match="the token grid of 'llava_onevision' is not known"):
        find_grounding_heads(onevision, make_examples("llava_onevision", 40), rule="localisation")
    boxed = with_span(make_example("llava_onevision", 0), Saliency.from_boxes((5, 5, 6, 6), (12, 12)))
    with pytest.raises(SaliencyError, match="example 0: image 0 in row 0 was said to have 12 x 12 pixels"):
        find_grounding_heads(onevision, [boxed] * 40)
    with pytest.raises(PatchError, match="training mode"):
        find_grounding_heads(model.train(), examples)


@pytest.mark.parametrize(
    "attention",
    [
        None,
        AttentionConfig(heads={1: "all"}, saliency=SaliencyConfig(source=None)),
        AttentionConfig(heads="all", saliency=SaliencyConfig(source="vision_attention")),
        AttentionConfig(heads="all", strength=0.0, saliency=SaliencyConfig(source=None)),
        AttentionConfig(heads="all", queries="generated", saliency=SaliencyConfig(source=None)),
        AttentionConfig(heads="all", gate=GateConfig(), saliency=SaliencyConfig(source=None)),
    ],
)
def test_a_model_that_is_patched_otherwise_is_refused_and_stays_so(attention):
    model = make_model("qwen2_vl")
    patch_model(model, SteerConfig(attention=attention))
    status = get_steer_status(model)
    with pytest.raises(PatchError, match="not so that all its 3 layers are always steered"):
        find_grounding_heads(model, make_examples("qwen2_vl", 40))
    assert get_steer_status(model) == status


# The picture and the command.


def test_the_picture_shows_every_score_and_the_random_sets(tmp_path):
    from PIL import Image

    from hf_steer.analysis.plots import plot_heads

    model, examples = make_model("qwen2_vl"), make_examples("qwen2_vl", 40)
    for name, kwargs in (("short", {"count": 2, "shortlist": 3}), ("whole", {"count": 12})):  # heads not tried; no random sets
        result = find_grounding_heads(model, examples, null_sets=3, **kwargs)
        picture = np.asarray(Image.open(plot_heads(result, tmp_path / f"{name}.png")).convert("L"))
        assert picture.std() > 5
        assert picture.shape[0] > 800
    assert "no others to compare them with" in result.verdict


def test_the_command_writes_the_result_as_json_csv_and_picture(tmp_path, capsys):
    arguments = ["heads", "--scenes", "20", "--rule", "mass", "--count", "2", "--null-sets", "3", "--output", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    result = HeadResult.from_json((tmp_path / "heads.json").read_text())
    assert AttentionConfig(heads=printed["heads"]) == AttentionConfig(heads=result.heads)
    assert result.report.measure == "answers"
    assert printed["files"] == [str(tmp_path / name) for name in ("heads.json", "heads.csv", "heads.png")]
    assert (tmp_path / "heads.csv").read_text() == result.to_csv()
    assert (tmp_path / "heads.png").stat().st_size > 10_000
    assert main(arguments) == 0
    assert "random heads, as many in the same layers (3 sets)" in capsys.readouterr().out


def test_the_command_asks_for_the_place_when_the_rule_is_to_point(tmp_path, capsys):
    arguments = ["heads", "--json", "--scenes", "25", "--rule", "pointing", "--count", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"]["measure"] == "pointing"
    assert printed["verdict"] == "found"


def test_the_help_says_which_rule_to_use_when(capsys):
    with pytest.raises(SystemExit):
        main(["heads", "--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {rule} " in printed for rule in RULES)
    assert set(heads_command.RULES) == set(RULES)


def write_lines(folder, count, **changes):
    scenes = digits.sample_scenes(digits.load_digits("training"), count, seed=0)
    lines = []
    for number, scene in enumerate(scenes):
        scene.image.save(folder / f"{number}.png")
        line = {"image": f"{number}.png", "question": "Read the digit.", "box": scene.boxes[1], "answer": str(scene.labels[1])}
        lines.append({**line, "thought": "I look at the picture and read what I see.\n</think>\n\n"})
    lines[0].update(changes)
    path = folder / "examples.jsonl"
    path.write_text("\n".join(json.dumps({key: value for key, value in line.items() if value is not None}) for line in lines))
    return path, scenes


def test_examples_come_from_a_file_through_the_processor(tmp_path, capsys):
    path, scenes = write_lines(tmp_path, 40)
    processor = AutoProcessor.from_pretrained(embedded_model_dir())
    for example, scene in zip(read_jsonl(path, processor), scenes, strict=True):
        text = processor.tokenizer.decode(example.inputs["input_ids"][0])
        assert "Read the digit." in text
        assert text.endswith("what I see.\n</think>\n\n")
        assert processor.tokenizer.decode([example.answer]) == str(scene.labels[1])
        assert example.span.regions[0].paint.on_grid(2, 2).tolist() == [[0, 1], [0, 0]]
    arguments = ["heads", "--json", "--examples-file", str(path), "--rule", "mass", "--null-sets", "2"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["examples"] == 20


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"image": "nowhere.png"}, "FileError", "nowhere.png' cannot be read as a picture"),
        ({"image": "examples.jsonl"}, "FileError", "examples.jsonl' cannot be read as a picture"),
        ({"box": [0, 0, 99, 9]}, "SaliencyError", "line 1: box (0.0, 0.0, 99.0, 9.0) is empty or outside"),
        ({"box": None}, "FileError", "line 1: a line is an object with image, question, box"),
        ({"boxes": [1]}, "FileError", "line 1: a line is an object with"),
        ({"question": 7}, "FileError", "line 1: question must be text"),
        ({"answer": ""}, "FileError", "answer must be text, and an answer not empty"),
    ],
)
def test_lines_that_are_no_examples_are_named(changes, kind, message, tmp_path, capsys):
    path, _ = write_lines(tmp_path, 2, **changes)
    assert main(["heads", "--json", "--examples-file", str(path)]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["kind"] == kind
    assert message in printed["error"]


def test_files_that_hold_no_json_are_refused(tmp_path, capsys):
    path = tmp_path / "examples.jsonl"
    for content, message in ((b"{", "line 1: not JSON"), (b"[1]", "line 1: a line is"), (b"\xff\xfe", "cannot be read")):
        path.write_bytes(content)
        assert main(["heads", "--examples-file", str(path)]) == 1
        assert message in capsys.readouterr().err
    assert main(["heads", "--examples-file", str(tmp_path / "nowhere")]) == 1
    assert main(["heads", "--model", "x"]) == 1
    assert "--model needs --examples-file" in capsys.readouterr().err
