"""What is measured of attention equals plain formulas on the weights that eager attention returns."""

from __future__ import annotations

import csv
import io
import math
from functools import partial

import pytest
import torch
from kit.gazing import every, gaze, logits, looking, prompt_for, steer
from kit.tiny import HEADS, IMAGE, LAYERS, SEEING, VIDEO, make_model, make_prompt
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model
from kit.versions import cache_of

from hf_steer import PatchError, SaliencyError, disable_steering, patch_model, unpatch_model, use_saliency, use_strength
from hf_steer.analysis import attention_metrics, metrics
from hf_steer.attention import logits_in_chunks
from hf_steer.patching import anatomy_of

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""As in test_contract: two kernels with other orders of summation, three layers of fp32."""
STEERED = ("steered_entropy_nats", "entropy_reduction_percent", "kl_nats", "steered_span_mass", "steered_span_entropy_nats")


def span_for(family, inputs):
    """Pictures where the family has eyes, some of the text elsewhere; rows without any, too."""
    if family in SEEING:
        return "image", inputs["input_ids"] == IMAGE
    marked = inputs["attention_mask"].bool() & (inputs["input_ids"] % 3 == 0)
    marked[1] = False
    assert marked.any()
    return marked, marked


@torch.no_grad()
def weights_of(model, inputs, statement=None):
    """`(layers, batch, heads, queries, keys)` fp64, of an eager model."""
    with looking(model, statement):
        return torch.stack(model(**inputs, output_attentions=True).attentions).double()


def entropy(weights):
    return -sum(weight * math.log(weight) for weight in weights if weight > 0)


def expected(before, after, counted, span):
    """Every column in plain loops, `(layers, heads)`; `after` is None without steering."""
    layers, batch, heads, queries, keys = before.shape
    sums, counts = {}, {}

    def add(name, layer, head, value):
        place = (name, layer, head)
        sums[place], counts[place] = sums.get(place, 0.0) + value, counts.get(place, 0) + 1

    for layer in range(layers):
        for b in range(batch):
            inside = [k for k in range(keys) if span[b, k]]
            for h in range(heads):
                for q in (q for q in range(queries) if counted[b, q]):
                    one = before[layer, b, h, q].tolist()
                    mass = sum(one[k] for k in inside)
                    add("entropy_nats", layer, h, entropy(one))
                    add("span_mass", layer, h, mass)
                    sees = any(one[k] > 0 for k in inside)
                    if sees:
                        add("span_entropy_nats", layer, h, entropy([one[k] / mass for k in inside]))
                        rest = sum(one[k] for k in range(keys) if not span[b, k])
                        if rest > 0:  # it sees something else, too
                            add("span_log_odds", layer, h, math.log(mass / rest))
                    if after is None:
                        continue
                    other = after[layer, b, h, q].tolist()
                    add("steered_entropy_nats", layer, h, entropy(other))
                    add("kl_nats", layer, h, sum(p * math.log(p / r) for p, r in zip(one, other, strict=True) if p > 0))
                    moved = sum(other[k] for k in inside)
                    add("steered_span_mass", layer, h, moved)
                    if sees:
                        add("steered_span_entropy_nats", layer, h, entropy([other[k] / moved for k in inside]))
    columns = {}
    for name, layer, head in sums:
        table = columns.setdefault(name, torch.full((layers, heads), math.nan, dtype=torch.float64))
        table[layer, head] = sums[name, layer, head] / counts[name, layer, head]
    if after is not None:
        columns["entropy_reduction_percent"] = 100 * (1 - columns["steered_entropy_nats"] / columns["entropy_nats"])
    return columns


def assert_agrees(found, wanted, **tolerance):
    for name, values in wanted.items():
        named = partial("{}: {}".format, name)
        torch.testing.assert_close(getattr(found, name).double(), values, msg=named, **tolerance)


@every
@pytest.mark.parametrize("padding", ["left", "right"])
def test_metrics_equal_plain_formulas_on_eager_weights(family, implementation, padding):
    inputs = prompt_for(family, padding=padding)
    statement, (span, marked) = gaze(family, inputs), span_for(family, inputs)
    model, reference = make_model(family, implementation), make_model(family, "eager")
    plain = logits(model, inputs)
    before = weights_of(reference, inputs)
    patch_model(reference, steer(family))
    after = weights_of(reference, inputs, statement)
    real = inputs["attention_mask"].bool()

    alone = attention_metrics(model, inputs, span=span)
    assert_agrees(alone, expected(before, None, real, marked), **TOLERANCE)
    assert all(getattr(alone, name) is None for name in STEERED)

    patch_model(model, steer(family))
    with looking(model, statement):
        both = attention_metrics(model, inputs, span=span)
    wanted = expected(before, after, real, marked)
    percent = wanted.pop("entropy_reduction_percent")
    assert_agrees(both, wanted, **TOLERANCE)
    # a percentage of entropies that are right to 1e-4
    torch.testing.assert_close(both.entropy_reduction_percent.double(), percent, rtol=1e-3, atol=2e-2)
    assert both.layers == tuple(range(LAYERS))
    assert both.queries == int(real.sum())
    assert both.kl_nats.shape == (LAYERS, HEADS)
    assert (both.kl_nats[0] == 0).all()  # the first steered layer is 1, with heads 0 and 3
    assert (both.kl_nats[1, [0, 3]] > 0.01).all()
    assert (both.kl_nats[1, [1, 2]] == 0).all()
    assert (both.kl_nats[2] > 0.01).all()
    for name in ("entropy_nats", "span_mass", "span_entropy_nats", "span_log_odds"):
        assert torch.equal(getattr(both, name), getattr(alone, name))
    unpatch_model(model)
    assert torch.equal(logits(model, inputs), plain)


@every
def test_with_the_same_logits_the_divergence_is_that_of_the_bias_alone(family, implementation):
    """KL(A ‖ A') = log E_A[e^b] - E_A[b], with A the steered pass's weights without their bias, in plain loops."""
    inputs = prompt_for(family)
    statement, (span, _) = gaze(family, inputs), span_for(family, inputs)
    model, reference = make_model(family, implementation), patch_model(make_model(family, "eager"), steer(family))
    patch_model(model, steer(family))
    with looking(model, statement):
        found = attention_metrics(model, inputs, span=span, same_logits=True)
    steered = weights_of(reference, inputs, statement)
    with torch.no_grad(), looking(reference, statement):
        scores = cache_of(reference(**inputs, use_cache=True)).hf_steer_state.scores.values.double()
    strengths = {1: (2.0, 0.0, 0.0, 2.0), 2: (2.0,) * HEADS}
    real = inputs["attention_mask"].bool()
    for layer in range(LAYERS):
        for head in range(HEADS):
            values = []
            for b, q in real.nonzero().tolist():
                bias = [strengths.get(layer, (0.0,) * HEADS)[head] * float(score) for score in scores[b]]
                undone = [w * math.exp(-own) for w, own in zip(steered[layer, b, head, q].tolist(), bias, strict=True)]
                own = [weight / sum(undone) for weight in undone]
                mean = sum(a * own_bias for a, own_bias in zip(own, bias, strict=True))
                values.append(math.log(sum(a * math.exp(own_bias) for a, own_bias in zip(own, bias, strict=True))) - mean)
            wanted = sum(values) / len(values)
            assert float(found.kl_nats[layer, head]) == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert (found.kl_nats[0] == 0).all()
    assert (found.kl_nats[1, [1, 2]] == 0).all()
    assert (found.kl_nats[2] > 0.01).all()


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_queries_and_layers_narrow_what_is_measured(family, padding):
    inputs = prompt_for(family, padding=padding)
    statement, (span, marked) = gaze(family, inputs), span_for(family, inputs)
    reference = make_model(family, "eager")
    before = weights_of(reference, inputs)
    patch_model(reference, steer(family))
    after = weights_of(reference, inputs, statement)
    real = inputs["attention_mask"].bool()
    queries = torch.zeros_like(real)
    queries[0, -9:-2] = queries[2, 7:] = True
    with looking(reference, statement):
        found = attention_metrics(reference, inputs, span=span, queries=queries, layers=[2, 1])
    wanted = expected(before[1:], after[1:], real & queries, marked)
    wanted.pop("entropy_reduction_percent")
    assert found.layers == (1, 2)
    assert found.queries == int((real & queries).sum())
    assert_agrees(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3"])
def test_per_query_values_are_those_whose_mean_is_reported(family):
    inputs = prompt_for(family)
    statement, (span, _) = gaze(family, inputs), span_for(family, inputs)
    model = patch_model(make_model(family), steer(family))
    with looking(model, statement):
        means, each = (attention_metrics(model, inputs, span=span, per_query=per_query) for per_query in (False, True))
    real = inputs["attention_mask"].bool()
    assert each.kl_nats.shape == (LAYERS, HEADS, *real.shape)
    assert torch.equal(~each.entropy_nats[0, 0].isnan(), real)
    for name in ("entropy_nats", "steered_entropy_nats", "kl_nats", "span_mass", "steered_span_mass", "span_entropy_nats"):
        torch.testing.assert_close(getattr(each, name).nanmean((2, 3)), getattr(means, name))
    assert len(each.rows()) == LAYERS * HEADS * int(real.sum())
    first = each.rows()[0]
    assert (first["layer"], first["head"], first["entropy_nats"]) == (0, 0, 0.0)  # a first token sees only itself
    assert first["query"] == int(real[first["row"]].long().argmax())
    assert first["entropy_reduction_percent"] == 0.0
    assert first["span_entropy_nats"] is None  # and no picture


@pytest.mark.parametrize("family", ["qwen2_audio", "voxtral", "llava", "llava_onevision"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_sounds_and_pictures_of_encoders_are_found_by_their_placeholders(family, padding):
    model = make_encoder_model(family, implementation="eager")
    inputs = make_encoder_inputs(family, padding=padding)
    found = attention_metrics(model, inputs, span="image" if "llava" in family else "audio")
    marked = inputs["input_ids"] == IMAGE
    wanted = expected(weights_of(model, inputs), None, inputs["attention_mask"].bool(), marked)
    assert_agrees(found, wanted, **TOLERANCE)
    assert 0 < found.span_queries[0] < found.queries


@pytest.mark.parametrize("family", SEEING)
def test_videos_and_pictures_of_one_prompt_are_told_apart(family):
    inputs = make_prompt(family, [[3, ("video", 2, 2, 2), 2, ("image", 2, 2), 4], [2, ("image", 2, 3), 2]])
    model = make_model(family, "eager")
    weights = weights_of(model, inputs)
    for modality, token in (("video", VIDEO), ("image", IMAGE)):
        marked = inputs["input_ids"] == token
        found = attention_metrics(model, inputs, span=modality)
        assert_agrees(found, expected(weights, None, inputs["attention_mask"].bool(), marked), **TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3"])
def test_sliding_windows_measure_the_keys_that_are_left(family, implementation):
    sliding = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    inputs = prompt_for(family, rows=[[4, ("image", 2, 3), 14], [6]])
    statement, (span, marked) = gaze(family, inputs), span_for(family, inputs)
    marked[:, 12:] = False  # all of it: pictures end there
    model, reference = make_model(family, implementation, **sliding), make_model(family, "eager", **sliding)
    assert "sliding_attention" in model.config.get_text_config().layer_types
    before = weights_of(reference, inputs)
    patch_model(reference, steer(family))
    patch_model(model, steer(family))
    with looking(model, statement):
        found = attention_metrics(model, inputs, span=span)
    wanted = expected(before, weights_of(reference, inputs, statement), inputs["attention_mask"].bool(), marked)
    wanted.pop("entropy_reduction_percent")
    assert_agrees(found, wanted, **TOLERANCE)
    assert found.span_queries[0] > found.span_queries[1]


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_bfloat16_is_measured_as_its_own_logits_say(family):
    """Held to float32 on the same rounded weights by what bfloat16 loses in three layers, and no more."""
    inputs = prompt_for(family)
    statement, (span, _) = gaze(family, inputs), span_for(family, inputs)
    model, reference = make_model(family).bfloat16(), make_model(family).bfloat16().float()
    found = []
    for each in (model, reference):
        patch_model(each, steer(family))
        with looking(each, statement):
            found.append(attention_metrics(each, inputs, span=span))
    assert found[0].entropy_nats.dtype == torch.float32
    for name in ("entropy_nats", "steered_entropy_nats", "kl_nats", "span_mass", "steered_span_mass"):
        # 8 bits: logits of size 4 are off by 0.02, and layers add up
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_no_chunk_holds_more_weights_than_the_bound(family, monkeypatch):
    inputs = prompt_for(family)
    statement, (span, _) = gaze(family, inputs), span_for(family, inputs)
    model = patch_model(make_model(family), steer(family))
    with looking(model, statement):
        whole = attention_metrics(model, inputs, span=span)
    sizes = []

    def watched(log_p):
        sizes.append(log_p.numel())
        return probabilities(log_p)

    probabilities = metrics.probabilities
    tokens = inputs["input_ids"].shape[1]
    bound = 2 * 3 * HEADS * tokens  # two queries
    monkeypatch.setattr(metrics, "logits_in_chunks", partial(logits_in_chunks, scores_per_chunk=bound))
    monkeypatch.setattr(metrics, "probabilities", watched)
    with looking(model, statement):
        chunked = attention_metrics(model, inputs, span=span)
    assert max(sizes) == bound
    for name in ("entropy_nats", "kl_nats", "span_mass", "steered_span_entropy_nats"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name))


def test_what_is_in_force_is_what_is_measured():
    inputs, model = prompt_for("qwen2"), patch_model(make_model("qwen2"), steer("qwen2", heads="all"))
    statement = gaze("qwen2", inputs)
    with use_saliency(model, statement):
        usual = attention_metrics(model, inputs, span=None)
        with use_strength(model, 4.0):
            harder = attention_metrics(model, inputs, span=None)
        with use_strength(model, 0.0):
            nothing = attention_metrics(model, inputs, span=None)
        with disable_steering(model):
            off = attention_metrics(model, inputs, span=None)
    assert (harder.kl_nats > usual.kl_nats).all()
    assert (usual.kl_nats > 0.01).all()
    for still in (nothing, off):
        assert (still.kl_nats == 0).all()
        assert torch.equal(still.steered_entropy_nats, still.entropy_nats)
    assert usual.span_mass is None


def test_a_small_divergence_is_not_lost_in_rounding():
    """KL of a bias of 0.003 on 1024 keys, 4e-6 nats, against float64: the formula with log-ratios alone is off by a tenth."""
    from hf_steer.analysis.distributions import entropy_nats, kl_nats

    z, s = torch.randn(64, 1024) * 0.1, torch.randn(1024)
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(z + 0.003 * s, -1)
    exact_p, exact_q = torch.log_softmax(z.double(), -1), torch.log_softmax((z + 0.003 * s).double(), -1)
    exact = (exact_p.exp() * (exact_p - exact_q)).sum(-1)
    torch.testing.assert_close(kl_nats(log_p, log_q).double(), exact, rtol=5e-3, atol=0)
    torch.testing.assert_close(entropy_nats(log_p), -(exact_p.exp() * exact_p).sum(-1).float())
    impossible = torch.tensor([0.0, -math.inf])
    assert entropy_nats(impossible) == 0
    assert kl_nats(impossible, impossible) == 0
    assert kl_nats(impossible, torch.tensor([0.5, 0.5]).log()) == pytest.approx(math.log(2))
    assert kl_nats(torch.tensor([0.5, 0.5]).log(), impossible) == math.inf


def test_the_table_prints_and_writes_what_was_measured():
    inputs, model = prompt_for("qwen2_vl"), patch_model(make_model("qwen2_vl"), steer("qwen2_vl"))
    found = attention_metrics(model, inputs)
    table = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [(int(row["layer"]), int(row["head"])) for row in table] == [(a, b) for a in range(LAYERS) for b in range(HEADS)]
    assert [float(row["kl_nats"]) for row in table] == found.kl_nats.flatten().tolist()
    lines = str(found).splitlines()
    assert len(lines) == 1 + LAYERS * HEADS
    assert lines[0].split()[:3] == ["layer", "head", "entropy_nats"]
    alone = attention_metrics(unpatch_model(model), inputs)
    assert "steered" not in str(alone).splitlines()[0]
    assert {row["kl_nats"] for row in csv.DictReader(io.StringIO(alone.to_csv()))} == {""}


@pytest.mark.parametrize(
    ("family", "rows", "kwargs", "message"),
    [
        ("qwen2_vl", [[5]], {}, r"none of the prompt's \(1, 5\) tokens are image tokens \(id 90\).*span=None"),
        ("qwen2_vl", None, {"span": "video"}, r"are video tokens \(id 91\)"),
        ("qwen2_vl", None, {"span": "audio"}, "'qwen2_vl' have no such tokens; they have image, video.*bool tensor"),
        ("llama", None, {}, "'llama' have no such tokens; they have only text"),
        ("llama", None, {"span": torch.ones(2, 2).bool()}, r"span must be a bool tensor \(3, 24\).*got torch.bool of"),
        ("llama", None, {"span": None, "queries": torch.ones(3, 24)}, r"queries must be a bool tensor.*got torch.float32"),
        ("llama", None, {"span": None, "queries": torch.zeros(3, 24).bool()}, "no query is left to measure"),
        ("llama", None, {"span": torch.zeros(3, 24).bool()}, r"tokens are marked in span"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(family, rows, kwargs, message):
    model = patch_model(make_model(family), steer(family))
    inputs = prompt_for(family, rows=rows)
    before = logits(model, inputs)
    with pytest.raises(SaliencyError, match=message):
        attention_metrics(model, inputs, **kwargs)
    assert torch.equal(logits(model, inputs), before)


def test_queries_that_come_before_the_span_are_refused():
    model, inputs = make_model("qwen2_vl"), make_prompt("qwen2_vl", [[5, ("image", 2, 2), 3]])
    queries = torch.zeros_like(inputs["input_ids"]).bool()
    queries[0, :4] = True
    with pytest.raises(SaliencyError, match="all of them come before it"):
        attention_metrics(model, inputs, queries=queries)
    before = [site.module.config for site in anatomy_of(model).layers]
    with pytest.raises(PatchError, match=r"layers \(0, 3\) asked for; this model has 3, 0 to 2"):
        attention_metrics(model, inputs, layers=[0, 3])
    with pytest.raises(SaliencyError, match=r"no cache \(past_key_values\).*the whole conversation"):
        attention_metrics(model, {**inputs, "past_key_values": object()})
    assert all(old is site.module.config for old, site in zip(before, anatomy_of(model).layers, strict=True))
