"""KL along the unsteered continuation equals plain formulas on one teacher-forced pass, however `generate` takes its path."""

from __future__ import annotations

import math

import pytest
import torch
from kit.gazing import CHUNKABLE, every, gaze, generate, logits, looking, prompt_for, row_of, steer
from kit.tiny import PAD, SEEING, make_model

from hf_steer import ConfigError, PatchError, Saliency, patch_model, unpatch_model, use_saliency, use_strength
from hf_steer.analysis import measure_retention

TOLERANCE = {"rtol": 1e-3, "atol": 2e-5}
"""Of a divergence of logits that agree to 1e-4, from prefill with a cache and from one pass."""
STEPS = 5


def steered(family, **attention):
    """Scores as given where they are given, so that longer prompts have the same ones."""
    return steer(family, **({} if family in SEEING else {"normalize": "none"}), **attention)


def longer(family, inputs, tokens, real, statement):
    """The prompt with its continuation, and what is said about both; labels on what was generated."""
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    whole = dict(inputs, input_ids=ids, attention_mask=torch.cat([inputs["attention_mask"], real.long()], 1))
    if family in SEEING:
        whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens).int()], 1)
    whole["labels"] = torch.cat([torch.full_like(inputs["input_ids"], -100), tokens.masked_fill(~real, -100)], 1)
    if statement is not None:
        statement = Saliency.from_tokens(torch.cat([statement.tokens, torch.zeros(tokens.shape)], 1))
    return whole, statement


def divergence(before, after):
    """KL(before ‖ after) of two rows of logits, in plain loops and fp64."""
    tops = [max(row) for row in (before, after)]
    totals = [sum(math.exp(x - top) for x in row) for row, top in zip((before, after), tops, strict=True)]
    logs = [[x - top - math.log(total) for x in row] for row, top, total in zip((before, after), tops, totals, strict=True)]
    return sum(math.exp(p) * (p - q) for p, q in zip(*logs, strict=True))


def end_rows(model, inputs):
    """Let a token that the model says early in some row end rows from now on."""
    said = generate(model, inputs, max_new_tokens=STEPS)[0][:, -STEPS:]
    model.generation_config.eos_token_id = int(said[0, 1])
    tokens = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ends = (tokens == model.generation_config.eos_token_id).long()
    return tokens, ends.cumsum(1) - ends == 0


@every
@pytest.mark.parametrize("queries", ["all", "generated"])
def test_divergence_equals_one_teacher_forced_pass(family, implementation, queries):
    inputs, model = prompt_for(family), make_model(family, implementation)
    statement = gaze(family, inputs)
    tokens, real = end_rows(model, inputs)
    assert not real.all()  # a row has ended
    assert (tokens[~real] == PAD).all()
    whole, said = longer(family, inputs, tokens, real, statement)
    start = inputs["input_ids"].shape[1] - 1
    before = logits(model, whole)[:, start:-1].double()
    patch_model(model, steered(family, queries=queries))
    after = logits(model, whole, said)[:, start:-1].double()
    found = measure_retention(model, inputs, saliency=statement, new_tokens=STEPS)
    rows = []
    for row in range(len(tokens)):
        steps = [divergence(before[row, t].tolist(), after[row, t].tolist()) for t in range(tokens.shape[1]) if real[row, t]]
        torch.testing.assert_close(found.per_step[row][real[row]], torch.tensor(steps), **TOLERANCE)
        rows.append(sum(steps) / len(steps))
    assert torch.equal(found.per_step.isnan(), ~real)
    assert found.per_row == pytest.approx(rows, rel=1e-3, abs=2e-5)
    assert found.kl_nats == pytest.approx(sum(rows) / len(rows), rel=1e-3, abs=2e-5)
    assert found.per_row[0] > 0.01


@every
def test_one_new_token_is_the_prompts_next_token_alone(family, implementation):
    inputs, model = prompt_for(family), make_model(family, implementation)
    before = logits(model, inputs)[:, -1].double()
    patch_model(model, steered(family))
    after = logits(model, inputs, gaze(family, inputs))[:, -1].double()
    found = measure_retention(model, inputs, saliency=gaze(family, inputs), new_tokens=1)
    assert found.per_step.shape == (3, 1)
    wanted = [divergence(before[row].tolist(), after[row].tolist()) for row in range(3)]
    assert found.per_row == pytest.approx(wanted, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize(("family", "implementation"), CHUNKABLE)
def test_chunks_and_static_caches_measure_the_same(family, implementation):
    inputs, model = prompt_for(family), patch_model(make_model(family, implementation), steered(family))
    with looking(model, gaze(family, inputs)):
        found = [
            measure_retention(model, inputs, new_tokens=4, generate_kwargs=kwargs).per_step
            for kwargs in (None, {"prefill_chunk_size": 5}, {"cache_implementation": "static"}, {"use_cache": False})
        ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **TOLERANCE)
    assert found[0].mean() > 0.01


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llama", "qwen2_audio"])
def test_a_batch_measures_what_its_rows_alone_measure(family):
    """The mean counts each prompt the same, in one batch or in several of unequal size."""
    inputs, model = prompt_for(family), make_model(family)
    statement = gaze(family, inputs)
    end_rows(model, inputs)
    patch_model(model, steered(family))
    together = measure_retention(model, inputs, saliency=statement, new_tokens=STEPS)
    pairs = []
    for row in range(3):
        keep = inputs["attention_mask"][row].bool()
        said = None if statement is None else Saliency.from_tokens(statement.tokens[row][keep])
        pairs.append((row_of(inputs, row, family), said))
    apart = measure_retention(model, pairs, new_tokens=STEPS)
    torch.testing.assert_close(apart.per_step, together.per_step, equal_nan=True, **TOLERANCE)
    assert apart.kl_nats == pytest.approx(together.kl_nats, rel=1e-3)
    assert apart.kl_nats == pytest.approx(sum(apart.per_row) / 3)


def test_what_is_in_force_is_measured_and_nothing_is_zero():
    inputs, model = prompt_for("qwen2"), patch_model(make_model("qwen2"), steered("qwen2"))
    with use_saliency(model, gaze("qwen2", inputs)):
        usual = measure_retention(model, inputs, new_tokens=3)
        with use_strength(model, 0.0):
            assert measure_retention(model, inputs, new_tokens=3).kl_nats == 0
    given = measure_retention(model, inputs, saliency=gaze("qwen2", inputs), new_tokens=3)
    assert given.kl_nats == usual.kl_nats > 0.01


def test_what_cannot_be_compared_is_refused():
    inputs, model = prompt_for("qwen2_vl"), make_model("qwen2_vl")
    with pytest.raises(PatchError, match="is not patched"):
        measure_retention(model, inputs)
    patch_model(model, steer("qwen2_vl"))
    with pytest.raises(ConfigError, match="new_tokens must be a whole number of at least 1; got 0"):
        measure_retention(model, inputs, new_tokens=0)
    with pytest.raises(ConfigError, match="holds num_beams, streamer, which this measurement sets itself"):
        measure_retention(model, inputs, generate_kwargs={"num_beams": 2, "streamer": None})
    with pytest.raises(ConfigError, match="no prompts to measure on"):
        measure_retention(model, [])
    with pytest.raises(ConfigError, match=r"list of pairs \(inputs, Saliency or None\); got a list of dict"):
        measure_retention(model, [inputs])
    with pytest.raises(ConfigError, match="each batch brings its own"):
        measure_retention(model, [(inputs, None)], saliency=Saliency.from_tokens([[1.0]]))
    unpatch_model(model)
