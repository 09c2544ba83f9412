"""What happens to the saliency when caches, rows, prompts and patches change between calls."""

from __future__ import annotations

import copy

import pytest
import torch
from kit.caches import cache_for
from kit.gazing import TOLERANCE, gaze, generate, logits, looking, prompt_for, steer
from kit.tiny import SEEING, make_model, make_prompt
from kit.versions import cache_of, cached
from transformers import DynamicCache

from hf_steer import Saliency, SaliencyError, disable_steering, patch_model, unpatch_model, use_saliency


@torch.no_grad()
def step(model, ids, cache, statement=None, **kwargs):
    with looking(model, statement):
        return model(input_ids=torch.tensor(ids), **cached(cache), **kwargs).logits


@pytest.mark.parametrize("family", SEEING)
def test_pictures_count_over_the_whole_conversation(family):
    model = patch_model(make_model(family), steer(family))
    first, second = make_prompt(family, [[3, ("image", 2, 3), 4]]), make_prompt(family, [[2, ("image", 3, 2), 3]], seed=1)
    later = {name: value for name, value in second.items() if name != "attention_mask"}
    length = second["input_ids"].shape[1]
    positions = 30 + torch.arange(length).view(1, 1, -1).expand(3, 1, -1)
    outputs, states = {}, {}
    for index in (0, 1):
        cache = cache_for(model)
        logits(model, first, **cached(cache))
        look = Saliency.from_boxes((0, 0, 10, 10), (30, 30), image=index)
        outputs[index] = logits(model, later, look, **cached(cache), position_ids=positions)
        states[index] = cache.hf_steer_state
    start = first["input_ids"].shape[1]
    for index, state in states.items():
        assert [span.index for span in state.spans] == [0, 1]
        scored = state.scores.values[0].nonzero().flatten()
        assert ((scored >= start) == bool(index)).all()
    assert not torch.equal(outputs[0], outputs[1])
    with pytest.raises(SaliencyError, match="no image 2 in row 0: .* holds 2 of them"):
        cache = cache_for(model)
        logits(model, first, **cached(cache))
        look = Saliency.from_boxes((0, 0, 10, 10), (30, 30), image=2)
        logits(model, later, look, **cached(cache), position_ids=positions)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_a_mask_as_long_as_a_static_cache_does_not_hide_the_saliency(family):
    model = patch_model(make_model(family), steer(family))
    inputs = {name: value for name, value in prompt_for(family, rows=[[9], [9]]).items() if name != "mm_token_type_ids"}
    statement = Saliency.from_tokens(torch.randn(2, 9))
    expected = logits(model, inputs, statement)
    longer = dict(inputs, attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, 31)))
    cache = cache_for(model, static=True)
    torch.testing.assert_close(logits(model, longer, statement, **cached(cache)), expected, **TOLERANCE)


def test_the_strength_of_the_present_patch_is_used_on_an_older_cache():
    model = patch_model(make_model("qwen2"), steer("qwen2", strength=3.0))
    inputs = prompt_for("qwen2", rows=[[9]])
    cache = cache_for(model)
    logits(model, inputs, Saliency.from_tokens(torch.randn(1, 9)), **cached(cache))
    found = {}
    for strength in (3.0, 0.25, -3.0):
        patch_model(unpatch_model(model), steer("qwen2", strength=strength))
        found[strength] = step(model, [[5]], copy.deepcopy(cache))
    with disable_steering(model):
        plain = step(model, [[5]], copy.deepcopy(cache))
    distance = {strength: float((output - plain).abs().max()) for strength, output in found.items()}
    assert 0 < distance[0.25] < 0.5 * distance[3.0]
    assert not torch.equal(found[3.0], found[-3.0])
    patch_model(unpatch_model(model), steer("qwen2", heads={0: (1,), 1: "all"}))
    assert torch.isfinite(step(model, [[5]], copy.deepcopy(cache))).all()


def dynamic_caches_reset():
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    cache.reset()
    return cache.get_seq_length() == 0


dynamic_reset = pytest.mark.skipif(not dynamic_caches_reset(), reason="this transformers keeps a reset dynamic cache's length")


@pytest.mark.parametrize(
    ("static", "rows"),  # a static cache keeps its batch size
    [pytest.param(False, 1, marks=dynamic_reset), pytest.param(False, 2, marks=dynamic_reset), (True, 1)],
)
def test_a_cache_that_was_reset_forgets_its_saliency(static, rows):
    model = patch_model(make_model("qwen2"), steer("qwen2"))
    cache = cache_for(model, static)
    logits(model, prompt_for("qwen2", rows=[[9]] * rows), Saliency.from_tokens(torch.randn(rows, 9)), **cached(cache))
    cache.reset()
    ids = [7, 8, 9, 10]
    fed = torch.cat([step(model, [[token]], cache) for token in ids], 1)
    fresh = cache_for(model, static)
    torch.testing.assert_close(fed, torch.cat([step(model, [[token]], fresh) for token in ids], 1), rtol=0, atol=0)


def test_padding_is_inferred_as_generate_infers_it():
    model = patch_model(make_model("qwen2"), steer("qwen2"))
    inputs = prompt_for("qwen2", rows=[[9], [6]])
    statement = gaze("qwen2", inputs)
    with_mask = generate(model, inputs, statement)[1]
    without = generate(model, {"input_ids": inputs["input_ids"]}, statement)[1]
    torch.testing.assert_close(without, with_mask, rtol=0, atol=0)
    with looking(model, statement):
        positional = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
        named = model.generate(inputs=None, input_ids=inputs["input_ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(positional, named)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_padding_is_read_from_a_four_dimensional_mask(kind):
    model = patch_model(make_model("qwen2"), steer("qwen2"))
    inputs = prompt_for("qwen2", rows=[[9], [6]])
    statement = gaze("qwen2", inputs)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    keys = inputs["attention_mask"].bool()
    allowed = (torch.ones(9, 9).tril().bool() & keys[:, None])[:, None]
    mask = allowed if kind == torch.bool else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    four = logits(model, {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": positions}, statement)
    two = logits(model, dict(inputs, position_ids=positions), statement)
    torch.testing.assert_close(four[keys], two[keys], **TOLERANCE)


def test_rows_that_move_take_their_saliency_along():
    model = patch_model(make_model("qwen2"), steer("qwen2"))
    inputs = prompt_for("qwen2", rows=[[9], [9]])
    statement = Saliency.from_tokens(torch.randn(2, 9))
    cache = cache_for(model)
    logits(model, inputs, statement, **cached(cache))
    straight = step(model, [[5], [5]], copy.deepcopy(cache))
    assert not torch.allclose(straight[0], straight[1], atol=1e-2)
    swapped, selected, repeated = (copy.deepcopy(cache) for _ in range(3))
    swapped.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(step(model, [[5], [5]], swapped), straight.flip(0), **TOLERANCE)
    selected.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(step(model, [[5]], selected), straight[1:], **TOLERANCE)
    repeated.batch_repeat_interleave(2)
    torch.testing.assert_close(step(model, [[5]] * 4, repeated), straight.repeat_interleave(2, 0), **TOLERANCE)


def test_one_statement_speaks_of_one_prompt_however_often_the_model_is_called():
    model = patch_model(make_model("qwen2"), steer("qwen2"))
    inputs = prompt_for("qwen2", rows=[[6]])
    statement = Saliency.from_tokens(torch.randn(1, 6))
    cache = cache_for(model)
    with use_saliency(model, statement):
        logits(model, inputs, **cached(cache))
        for ids in ([[5, 6]], [[7]], [[5, 6, 7, 8, 9, 10]]):  # the last has as many tokens as there are scores
            step(model, ids, cache)
        assert cache.hf_steer_state.length == 6
        assert torch.isfinite(step(model, [[5]], copy.deepcopy(cache))).all()
    assert copy.deepcopy(cache).hf_steer_state.statement is statement


def test_a_cropped_cache_loses_the_saliency_of_what_was_cut():
    model = patch_model(make_model("qwen2"), steer("qwen2", normalize="none"))
    inputs = prompt_for("qwen2", rows=[[9]])
    scores = torch.randn(1, 9)
    cache = cache_for(model)
    logits(model, inputs, Saliency.from_tokens(scores), **cached(cache))
    cache.crop(-3)
    again = step(model, [[5]], cache)
    short = dict(inputs, input_ids=inputs["input_ids"][:, :6], attention_mask=inputs["attention_mask"][:, :6])
    fresh = cache_for(model)
    logits(model, short, Saliency.from_tokens(scores[:, :6]), **cached(fresh))
    torch.testing.assert_close(again, step(model, [[5]], fresh), **TOLERANCE)


def test_training_on_generated_queries_needs_labels():
    model = patch_model(make_model("qwen2").train(), steer("qwen2", queries="generated"))
    inputs = prompt_for("qwen2")
    with looking(model, gaze("qwen2", inputs)):
        model(**inputs, labels=inputs["input_ids"])
        with pytest.raises(SaliencyError, match="no labels reached the patched model.*queries='all'"):
            model(**inputs)
        with torch.no_grad():
            model(**inputs)


def test_calling_past_the_root_hook_steers_all_the_same():
    """As PEFT does: it calls `forward` of the model inside."""
    for family in ("qwen2", "qwen2_vl"):
        model = patch_model(make_model(family), steer(family))
        inputs = prompt_for(family)
        expected = logits(model, inputs, gaze(family, inputs))
        with torch.no_grad(), looking(model, gaze(family, inputs)):
            assert torch.equal(model.forward(**inputs).logits, expected)
            assert torch.equal(model(inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"}).logits, expected)


def test_guidance_steers_the_prompt_and_not_its_counterpart():
    model = patch_model(make_model("qwen2"), steer("qwen2"))
    inputs = prompt_for("qwen2", rows=[[9]])
    statement = gaze("qwen2", inputs)
    cached = generate(model, inputs, statement, guidance_scale=1.5)[0]
    uncached = generate(model, inputs, statement, guidance_scale=1.5, use_cache=False)[0]
    assert torch.equal(cached, uncached)


def test_drafts_of_the_same_model_change_nothing():
    model = patch_model(make_model("qwen2"), steer("qwen2"))
    inputs = prompt_for("qwen2", rows=[[9]])
    statement = gaze("qwen2", inputs)
    greedy = generate(model, inputs, statement, max_new_tokens=8)[0]
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": make_model("qwen2", seed=1)}):
        with looking(model, statement):
            assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, **draft), greedy)


def test_off_stays_off_inside():
    model = make_model("qwen2")
    inputs = prompt_for("qwen2")
    plain = logits(model, inputs)
    patch_model(model, steer("qwen2"))
    with disable_steering(model), use_saliency(model, gaze("qwen2", inputs)):
        assert torch.equal(logits(model, inputs), plain)


def test_the_default_dtype_does_not_leak_into_the_bias():
    model = patch_model(make_model("qwen2_vl"), steer("qwen2_vl"))
    inputs = prompt_for("qwen2_vl")
    look = Saliency.from_boxes((0, 0, 10, 10), (30, 30)) + Saliency.from_points((3, 4), (30, 30), image=1)
    expected = logits(model, inputs), logits(model, inputs, look)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(logits(model, inputs), expected[0])
        look = Saliency.from_boxes((0, 0, 10, 10), (30, 30)) + Saliency.from_points((3, 4), (30, 30), image=1)
        assert torch.equal(logits(model, inputs, look), expected[1])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_a_cache_that_the_model_made_carries_the_saliency_on(family):
    model = patch_model(make_model(family), steer(family))
    inputs = prompt_for(family, rows=[[4, ("image", 2, 3), 5]])
    statement = gaze(family, inputs)
    given = cache_for(model)
    logits(model, inputs, statement, **cached(given))
    for as_tuple in (False, True):
        with torch.no_grad(), looking(model, statement):
            output = model(**inputs, use_cache=True, return_dict=not as_tuple)
        made = output[1] if as_tuple else cache_of(output)
        torch.testing.assert_close(step(model, [[5]], made), step(model, [[5]], copy.deepcopy(given)), rtol=0, atol=0)
    unsteered = copy.deepcopy(given)
    del unsteered.hf_steer_state
    with disable_steering(model):
        plain = step(model, [[5]], unsteered)
    assert not torch.allclose(plain, step(model, [[5]], copy.deepcopy(given)), atol=1e-3)
