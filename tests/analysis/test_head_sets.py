"""Sets of grounding heads: how they are chosen, and claims about them with their controls."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from kit.grounding import make_examples
from kit.tiny import HEADS, LAYERS, make_model
from transformers import AutoModelForImageTextToText

from hf_steer import AttentionConfig, ConfigError
from hf_steer.analysis import HeadExample, HeadResult, find_grounding_heads
from hf_steer.analysis.heads.report import bootstrap, make_report, random_sets
from hf_steer.analysis.heads.selection import Answers, grow
from hf_steer.embedded import embedded_model_dir
from hf_steer.evidence.scenes import digit_examples


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
