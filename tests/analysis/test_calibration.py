"""A calibrated strength keeps its budget when measured again; a target mass is met where the closed form says so."""

from __future__ import annotations

import json
import math

import pytest
import torch
from kit.gazing import EVERYTHING, gaze, logits, looking, prompt_for, steer
from kit.tiny import HEADS, IMAGE, SEEING, make_model

from hf_steer import (
    AttentionConfig,
    ConfigError,
    PatchError,
    Saliency,
    SaliencyConfig,
    SaliencyError,
    SteerConfig,
    disable_steering,
    patch_model,
    unpatch_model,
    use_saliency,
    use_strength,
)
from hf_steer.analysis import attention_metrics, calibrate_strength, measure_retention, strength_for_mass, target_mass
from hf_steer.analysis.bracketing import search
from hf_steer.analysis.pointed import pointed_at
from hf_steer.analysis.prompts import Batch, last_queries
from hf_steer.testing.zoo import tiny_model

STEERED = {1: (0, 3), 2: (0, 1, 2, 3)}
"""What `steer` steers, its negative layer resolved."""


@pytest.mark.parametrize(
    ("curve", "largest", "wanted"),
    [
        (lambda value: value**2, 64.0, 1.5),
        (lambda value: value**2, 1.0, 1.0),  # the largest keeps it
        (lambda value: value**2, 1.2, 1.2),
        (lambda value: value**2 / 400, 64.0, 30.0),
        (lambda value: 1e4 * value**2, 64.0, 0.015),
        (lambda value: math.nan if value > 5 else 0.0, 64.0, 5.0),
        (lambda value: 9.0 if value else 0.0, 64.0, 0.0),
    ],
)
def test_a_search_ends_just_below_the_budget_at_a_measured_value(curve, largest, wanted):
    measured = {}

    def measure(value):
        assert value not in measured  # nothing is measured twice
        measured[value] = curve(value)
        return measured[value]

    found = search(measure, 2.25, largest=largest, tolerance=0.01, most=20)
    assert found.kl_nats == measured[found.value] <= 2.25
    assert wanted * 0.99 <= found.value <= wanted
    assert found.largest_kept == (found.value == largest)
    if not found.largest_kept and found.value:
        above = min(value for value in measured if value > found.value)
        assert not measured[above] <= 2.25
        assert above <= found.value / 0.99


def test_a_search_says_when_divergence_does_not_grow():
    bump = search(lambda value: 3.0 if 0.4 < value < 0.6 else value, 1.7, largest=8.0, tolerance=0.01, most=16)
    assert bump.monotone  # never measured there
    dip = search(lambda value: 0.1 if value > 1.2 else value, 0.5, largest=8.0, tolerance=0.01, most=16)
    assert dip.value < 0.6  # 1 exceeds, so that larger ones are not tried
    dent = search(lambda value: 0.9 if value < 1.5 else 0.5 if value < 6 else 3.0, 0.95, largest=8.0, tolerance=0.01, most=16)
    assert dent.monotone is False


def test_a_budget_below_the_noise_is_refused():
    with pytest.raises(ConfigError, match=r"below the noise of this model.*differ by 0\.3 nats"):
        search(lambda value: 0.3 + value, 0.2, largest=8.0, tolerance=0.01, most=16)


def measured(model, inputs, statement, strength, *, new_tokens=3):
    with use_strength(model, strength):
        return measure_retention(model, inputs, saliency=statement, new_tokens=new_tokens).kl_nats


@pytest.mark.parametrize(("family", "implementation"), EVERYTHING)
def test_one_strength_keeps_the_budget_and_the_next_one_measured_does_not(family, implementation):
    inputs, model = prompt_for(family), patch_model(make_model(family, implementation), steer(family))
    statement = gaze(family, inputs)
    before = logits(model, inputs, statement)
    found = calibrate_strength(model, inputs, 0.05, saliency=statement, new_tokens=3, tolerance=0.05)
    assert torch.equal(logits(model, inputs, statement), before)
    assert measured(model, inputs, statement, found.strength) == pytest.approx(found.kl_nats, rel=1e-3)
    assert found.kl_nats <= 0.05
    above = min(one.strength for one in found.evaluations if one.strength > found.strength)
    assert measured(model, inputs, statement, above) > 0.05
    assert found.strength >= 0.95 * above
    assert not found.largest_kept
    assert found.attention.heads == STEERED
    patch_model(unpatch_model(model), SteerConfig(attention=found.attention))
    assert measure_retention(model, inputs, saliency=statement, new_tokens=3).kl_nats == pytest.approx(found.kl_nats, rel=1e-3)


@pytest.mark.parametrize(("family", "queries"), [("qwen2_vl", "all"), ("llama", "all"), ("gpt2", "all"), ("llama", "generated")])
@pytest.mark.parametrize("budget", [1e-3, 0.05, 0.4])
def test_a_calibration_takes_the_work_of_twenty_passes_at_most(family, queries, budget):
    """Counted in tokens that go through the model, beside those of one pass over prompt and continuation."""
    prompt = prompt_for(family if family != "gpt2" else "llama")
    model = make_model(family) if family != "gpt2" else tiny_model("gpt2")
    patch_model(model, steer(family, queries=queries, heads="all"))
    through = []

    def count(module, args, kwargs):
        through.append(kwargs["input_ids"].numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    found = calibrate_strength(model, prompt, budget, saliency=gaze(family, prompt), new_tokens=4)
    handle.remove()
    rows, tokens = prompt["input_ids"].shape
    assert sum(through) <= 20 * rows * (tokens + 4)
    assert found.kl_nats <= budget
    again = measured(model, prompt, gaze(family, prompt), found.strength, new_tokens=4)
    assert again == pytest.approx(found.kl_nats, rel=1e-2)


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_strengths_per_head_keep_the_whole_budget_together(family):
    inputs, model = prompt_for(family), patch_model(make_model(family), steer(family))
    statement = gaze(family, inputs)
    found = calibrate_strength(model, inputs, 0.05, saliency=statement, new_tokens=3, per_head=True, tolerance=0.05)
    assert {layer: tuple(own) for layer, own in found.strength.items()} == STEERED
    assert measured(model, inputs, statement, found.strength) == pytest.approx(found.kl_nats, rel=1e-3)
    assert found.kl_nats <= 0.05
    part = 0.05 / 6
    alone = {
        (layer, head): max(
            one.strength[layer][head]
            for one in found.evaluations
            if dict(one.strength) == {layer: {head: one.strength.get(layer, {}).get(head)}} and one.kl_nats <= part
        )
        for layer, own in STEERED.items()
        for head in own
    }
    factors = [found.strength[layer][head] / value for (layer, head), value in alone.items()]
    assert factors == pytest.approx([factors[0]] * 6)  # one common factor
    louder = {layer: {head: value / 0.95 for head, value in own.items()} for layer, own in found.strength.items()}
    assert measured(model, inputs, statement, louder) > 0.05
    patch_model(unpatch_model(model), SteerConfig(attention=found.attention))
    assert measure_retention(model, inputs, saliency=statement, new_tokens=3).kl_nats == pytest.approx(found.kl_nats, rel=1e-3)


def test_a_largest_strength_that_keeps_the_budget_is_reported_as_such():
    inputs, model = prompt_for("qwen2"), patch_model(make_model("qwen2"), steer("qwen2"))
    with use_saliency(model, gaze("qwen2", inputs)):
        found = calibrate_strength(model, inputs, 50.0, new_tokens=2, largest=3.0)
    assert found.strength == 3.0
    assert found.largest_kept
    assert [one.strength for one in found.evaluations] == [1.0, 3.0]
    with use_saliency(model, gaze("qwen2", inputs)):
        several = calibrate_strength(model, inputs, 50.0, new_tokens=2, largest=3.0, per_head=True)
    assert several.largest_kept
    assert {value for own in several.strength.values() for value in own.values()} == {3.0}


def test_several_batches_are_one_calibration_set():
    model = patch_model(make_model("qwen2_vl"), steer("qwen2_vl"))
    batches = [(prompt_for("qwen2_vl", rows=rows), None) for rows in ([[4, ("image", 2, 3), 5]], [[2, ("image", 2, 2), 3], [7]])]
    found = calibrate_strength(model, batches, 0.02, new_tokens=2)
    with use_strength(model, found.strength):
        parts = [measure_retention(model, inputs, new_tokens=2).per_row for inputs, _ in batches]
    rows = [value for part in parts for value in part]
    assert len(rows) == 3
    assert sum(rows) / 3 == pytest.approx(found.kl_nats)
    assert found.kl_nats <= 0.02


def test_json_holds_what_a_configuration_needs():
    inputs, model = prompt_for("qwen2_vl"), patch_model(make_model("qwen2_vl"), steer("qwen2_vl"))
    for per_head in (False, True):
        found = calibrate_strength(model, inputs, 0.1, new_tokens=1, per_head=per_head, tolerance=0.3)
        saved = json.loads(found.to_json())
        attention = {"heads": saved["heads"], "strength": saved["strength"]}
        config = SteerConfig.from_dict({"schema_version": 1, "attention": attention})
        assert config.attention.strength == found.strength
        assert config.attention.heads == found.attention.heads
        assert saved["kl_nats"] == found.kl_nats
        assert len(saved["evaluations"]) == len(found.evaluations)
        assert saved["provenance"]["model_type"] == "qwen2_vl"


@pytest.mark.parametrize(
    ("budget", "kwargs", "message"),
    [
        (0, {}, "budget_nats must be above 0; got 0"),
        (-1.0, {}, "budget_nats must be above 0; got -1.0"),
        (math.inf, {}, "budget_nats must be a finite number"),
        ("1", {}, "budget_nats must be a finite number; got '1'"),
        (1.0, {"largest": -2.0}, "largest must be above 0"),
        (1.0, {"tolerance": 1.0}, r"tolerance must be in \(0, 1\); got 1.0"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budget, kwargs, message):
    inputs, model = prompt_for("qwen2_vl"), patch_model(make_model("qwen2_vl"), steer("qwen2_vl"))
    before = logits(model, inputs)
    with pytest.raises(ConfigError, match=message):
        calibrate_strength(model, inputs, budget, **kwargs)
    with pytest.raises(ConfigError, match="no prompts to measure on"):
        calibrate_strength(model, [], 1.0)
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("calibrate", [calibrate_strength, strength_for_mass])
def test_models_that_steer_nothing_are_refused(calibrate):
    inputs, model = prompt_for("qwen2"), make_model("qwen2")
    with pytest.raises(PatchError, match="is not patched"):
        calibrate(model, inputs, 0.5)
    for config in (SteerConfig(), steer("qwen2", strength=0.0)):
        patch_model(model, config)
        with pytest.raises(PatchError, match="steers no head"):
            calibrate(model, inputs, 0.5)
        unpatch_model(model)


def binary(inputs, marked):
    return Saliency.from_tokens((marked & inputs["attention_mask"].bool()).float())


def marked_for(family, inputs):
    """Pictures, or some of the text; nothing in row 1."""
    marked = (inputs["input_ids"] == IMAGE) if family in SEEING else inputs["input_ids"] % 3 == 0
    marked[1] = False
    return marked & inputs["attention_mask"].bool()


@torch.no_grad()
def mass_of(model, inputs, marked, layer, statement=None):
    """`(batch, heads, queries)` fp64 of an eager model: share of the weights on the marked tokens."""
    with looking(model, statement):
        weights = model(**inputs, output_attentions=True).attentions[layer].double()
    return (weights * marked[:, None, None]).sum(-1)


@pytest.mark.parametrize(("family", "implementation"), EVERYTHING)
@pytest.mark.parametrize("target", [0.05, 0.6, 0.97])
def test_one_query_gives_the_span_exactly_the_target(family, implementation, target):
    """In a layer whose inputs are as they were, each of its heads; against the weights of eager attention."""
    inputs = prompt_for(family)
    marked = marked_for(family, inputs)
    statement, query = binary(inputs, marked), torch.zeros_like(marked)
    query[2, -1] = True
    model, reference = make_model(family, implementation), make_model(family, "eager")
    before = mass_of(reference, inputs, marked, 1)[2, :, -1]
    for each in (model, reference):
        patch_model(each, steer(family, heads={1: (0, 2, 3)}, normalize="none"))
    found = strength_for_mass(model, inputs, target, saliency=statement, queries=query)
    for head in (0, 2, 3):
        psi = float(before[head])
        wanted = math.log(target * (1 - psi) / (psi * (1 - target)))
        assert found.strength[1][head] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert found.unsteered_mass[1][head] == pytest.approx(psi, rel=1e-4)
        assert found.steered_mass[1][head] == pytest.approx(target, rel=1e-4)
    assert found.queries == 1
    patch_model(unpatch_model(reference), SteerConfig(attention=found.attention))
    after = mass_of(reference, inputs, marked, 1, statement)[2, :, -1]
    assert after[[0, 2, 3]].tolist() == pytest.approx([target] * 3, rel=1e-4)
    assert float(after[1]) == pytest.approx(float(before[1]), rel=1e-4)  # not steered


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3", "llava"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_of_several_queries_the_mean_share_is_the_targets(family, padding):
    inputs = prompt_for(family, padding=padding)
    marked = marked_for(family, inputs)
    statement, real = binary(inputs, marked), inputs["attention_mask"].bool()
    model = patch_model(make_model(family, "eager"), steer(family, heads={1: "all"}, normalize="none"))
    found = strength_for_mass(model, [(inputs, statement)], 0.4)
    patch_model(unpatch_model(model), SteerConfig(attention=found.attention))
    mass = mass_of(model, inputs, marked, 1, statement)
    masses = [[] for _ in range(HEADS)]
    for row in range(3):
        for query in range(real.shape[1]):
            seen = marked[row, : query + 1].any() and (real & ~marked)[row, : query + 1].any()
            for head in range(HEADS):
                if real[row, query] and seen:
                    masses[head].append(float(mass[row, head, query]))
    assert found.queries == len(masses[0])
    for head in range(HEADS):
        assert found.steered_mass[1][head] == pytest.approx(sum(masses[head]) / len(masses[head]), rel=1e-4)
        assert found.steered_mass[1][head] == pytest.approx(0.4, rel=0.05)
    assert found.missed_share == pytest.approx(max(abs(own / 0.4 - 1) for own in found.steered_mass[1].values()), abs=1e-6)


@pytest.mark.parametrize(("queries", "target"), [("all", 0.3), ("all", 0.8), ("generated", 0.5)])
def test_many_steered_layers_reach_the_target_together(queries, target):
    """Each steered layer moves what the later ones see: the closed form alone misses."""
    model = make_model("llama", num_hidden_layers=9)
    inputs = prompt_for("llama", rows=[[30], [24], [27]])
    statement = binary(inputs, inputs["input_ids"] % 5 == 0)
    patch_model(model, steer("llama", heads="all", normalize="none", queries=queries))
    found = strength_for_mass(model, inputs, target, saliency=statement)
    assert found.missed_share <= 0.05
    assert found.passes > 1
    assert list(found.strength) == list(range(9))
    for own in found.steered_mass.values():
        assert list(own.values()) == pytest.approx([target] * HEADS, rel=0.05)
    spoken = None if queries == "all" else last_queries(inputs)
    with use_strength(model, found.strength), use_saliency(model, statement):
        seen = attention_metrics(model, inputs, span=statement.tokens.bool(), queries=spoken, per_query=True).steered_span_mass
    with disable_steering(model):
        odds = attention_metrics(model, inputs, span=statement.tokens.bool(), queries=spoken, per_query=True, same_logits=True)
    share = seen.masked_fill(odds.span_log_odds.isnan(), math.nan).nanmean((2, 3))
    assert [list(own.values()) for own in found.steered_mass.values()] == [pytest.approx(row, rel=1e-3) for row in share.tolist()]
    assert "is met" in str(found)
    assert len(repr(found)) < 200
    assert json.loads(found.to_json())["strength"]["8"]["3"] == found.strength[8][3]


@pytest.mark.parametrize("kept", [None, False])
def test_a_box_that_covers_parts_of_tokens_gets_its_target_with_the_defaults(kept):
    inputs, (height, width) = prompt_for("qwen2_vl", rows=[[3, ("image", 4, 3), 5]]), (112, 84)
    saliency = SaliencyConfig(source=None, preserve_mass=kept)
    model = patch_model(make_model("qwen2_vl"), AttentionConfig(heads={1: (0, 2), 2: "all"}, saliency=saliency))
    box = Saliency.from_boxes((10, 20, 0.6 * width, 0.7 * height), (width, height))
    image = attention_metrics(model, inputs, layers=(1, 2), queries=last_queries(inputs)).span_mass
    target = 0.5 * float(image.min())  # a picture that keeps its mass can give no more than that
    found = strength_for_mass(model, inputs, target, saliency=box)
    assert found.missed_share <= 0.05, str(found)
    patch_model(unpatch_model(model), found.attention)
    with use_saliency(model, box):
        span = pointed_at(model, Batch(inputs, None), 1)
        assert 1 < span.sum() < 12
        told = attention_metrics(model, inputs, layers=(1,), span=span, queries=last_queries(inputs)).steered_span_mass
    assert told[0, [0, 2]].tolist() == pytest.approx([target] * 2, rel=0.05)
    missed = strength_for_mass(model, inputs, 0.97, saliency=box).missed_share
    assert missed < 0.05 or kept is None


def test_a_target_that_is_missed_is_said_to_be(monkeypatch):
    monkeypatch.setattr(target_mass, "MOST", 1)
    monkeypatch.setattr(target_mass, "ENOUGH", 2.0)  # nothing is mended
    inputs = prompt_for("qwen2_vl")
    marked = marked_for("qwen2_vl", inputs)
    model = patch_model(make_model("qwen2_vl"), steer("qwen2_vl", heads="all", normalize="none"))
    found = strength_for_mass(model, inputs, 0.4, saliency=binary(inputs, marked))
    worst = max(abs(mass / 0.4 - 1) for own in found.steered_mass.values() for mass in own.values())
    assert found.missed_share == pytest.approx(worst)
    assert worst > 0.05
    assert "is not met" in str(found)


def test_generated_queries_are_measured_where_they_are_steered():
    inputs = prompt_for("llama", padding="right")
    statement = binary(inputs, marked_for("llama", inputs))
    model = patch_model(make_model("llama"), steer("llama", heads={1: (1,)}, normalize="none", queries="generated"))
    inputs = {name: value[2:] for name, value in inputs.items()}  # one row, and so one query
    found = strength_for_mass(model, inputs, 0.7, saliency=Saliency.from_tokens(statement.tokens[2:]))
    assert found.queries == 1
    assert found.steered_mass[1][1] == pytest.approx(0.7, rel=1e-4)


@pytest.mark.parametrize("target", [0, 1, -0.5, 1.5])
def test_a_target_outside_of_zero_and_one_is_refused(target):
    model = patch_model(make_model("qwen2"), steer("qwen2", normalize="none"))
    with pytest.raises(ConfigError, match=rf"target_mass must lie in \(0, 1\); got {target}"):
        strength_for_mass(model, prompt_for("qwen2"), target)


def test_a_saliency_that_no_closed_form_fits_is_refused():
    inputs, model = prompt_for("qwen2_vl"), make_model("qwen2_vl")
    marked = marked_for("qwen2_vl", inputs)
    patch_model(model, steer("qwen2_vl", normalize="none", preserve_mass=True))
    with pytest.raises(ConfigError, match="preserve_mass=True keeps the mass where it is"):
        strength_for_mass(model, inputs, 0.5, saliency=binary(inputs, marked))
    patch_model(unpatch_model(model), steer("qwen2_vl"))
    plain = logits(model, inputs)
    for statement in (None, binary(inputs, marked)):  # its own eyes; z-scores
        with pytest.raises(SaliencyError, match=r"needs a saliency from 0 to 1.*normalize at 'auto'"):
            strength_for_mass(model, inputs, 0.5, saliency=statement)
    patch_model(unpatch_model(model), steer("qwen2_vl", normalize="none"))
    with pytest.raises(SaliencyError, match="in force are scores from 0 to 0"):
        strength_for_mass(model, inputs, 0.5, saliency=Saliency.from_tokens(torch.zeros(marked.shape)))
    with pytest.raises(SaliencyError, match="can attend both to the span and to something else"):
        strength_for_mass(model, inputs, 0.5, saliency=binary(inputs, torch.ones_like(marked)))
    with pytest.raises(ConfigError, match="queries has 2 tensors for 1 batches"):
        strength_for_mass(model, inputs, 0.5, saliency=binary(inputs, marked), queries=[marked, marked])
    patch_model(unpatch_model(model), steer("qwen2_vl"))
    assert torch.equal(logits(model, inputs), plain)
