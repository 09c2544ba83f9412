"""The contract in the kinds of call that `check_family` knows nothing of: chunks, turns, other caches, rows alone, training.

Each test patches a tiny random model of the family and compares with what the mathematics says the call must give. What can be
checked on any one model and batch is in `tests/testing`.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from kit.gazing import (
    CHUNKABLE,
    SIGHTED,
    TOLERANCE,
    every,
    gaze,
    generate,
    logits,
    looking,
    prompt_for,
    real_logits,
    row_of,
    sighted,
    steer,
)
from kit.tiny import HEADS, IMPLEMENTATIONS, LAYERS, PAD, SEEING, make_model
from kit.versions import ENCODES_FIRST, cache_of, cached, generates_from_embeds, repeats_pictures
from transformers import DynamicCache, StaticCache

import hf_steer
from hf_steer import Saliency, disable_steering, patch_model, unpatch_model, use_saliency


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "qwen2"])
def test_a_failure_at_any_edit_of_patch_model_leaves_the_model_as_it_was(family, monkeypatch):
    from hf_steer.patching import handle

    model = make_model(family)
    inputs = prompt_for(family)
    plain = logits(model, inputs)
    real_edits = handle.Steering.edits
    count = len(list(real_edits(handle.Steering(hf_steer.patching.make_plan(model, steer(family))))))
    assert count >= 6
    for failing in range(count):

        class Broken:
            def __enter__(self):
                raise MemoryError("injected")

            def __exit__(self, *_):
                raise AssertionError("never entered")

        def edits(self, failing=failing):
            for number, edit in enumerate(real_edits(self)):
                yield Broken() if number == failing else edit

        monkeypatch.setattr(handle.Steering, "edits", edits)
        with pytest.raises(MemoryError, match="injected"):
            patch_model(model, steer(family))
        assert not hf_steer.get_steer_status(model).patched
        assert torch.equal(logits(model, inputs), plain)
    monkeypatch.undo()
    unpatch_model(patch_model(model, steer(family)))
    assert torch.equal(logits(model, inputs), plain)


@every
@pytest.mark.parametrize("backend", ["folded", "mask"])
@pytest.mark.parametrize("rows", [None, [[4, ("image", 2, 3), 5]]], ids=["padded", "unpadded"])
def test_backends_agree_with_each_other(family, implementation, backend, rows):
    """Without padding transformers makes no mask, and the causal one is the backend's own."""
    model = make_model(family, implementation)
    inputs = prompt_for(family, rows=rows)
    plain = logits(model, inputs)
    patch_model(model, steer(family))
    automatic = logits(model, inputs, gaze(family, inputs))
    patch_model(unpatch_model(model), steer(family, backend=backend))
    named = logits(model, inputs, gaze(family, inputs))
    torch.testing.assert_close(real_logits(named, inputs), real_logits(automatic, inputs), **TOLERANCE)
    assert (named - plain).abs().max() > 0.1
    generated = [generate(model, inputs, gaze(family, inputs), max_new_tokens=4)]
    patch_model(unpatch_model(model), steer(family))
    generated.append(generate(model, inputs, gaze(family, inputs), max_new_tokens=4))
    torch.testing.assert_close(generated[0][1], generated[1][1], **TOLERANCE)


@sighted
def test_prefill_and_decode_equal_one_pass_where_mass_is_preserved(family, implementation):
    """Only in pictures: token scores are one group over the prompt, which one pass cannot tell from the new tokens."""
    model = patch_model(make_model(family, implementation), steer(family, preserve_mass=True))
    inputs = prompt_for(family, rows=[[4, ("image", 2, 3), 5]])
    sequences, steps = generate(model, inputs, max_new_tokens=5)
    whole = dict(inputs, input_ids=sequences, attention_mask=torch.ones_like(sequences))
    whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 5))
    torch.testing.assert_close(steps, logits(model, whole)[:, -6:-1], **TOLERANCE)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:backend 'cpu_flash' gives way")
@pytest.mark.parametrize("backend", ["auto", "folded", "mask", "cpu_flash"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_unpadded_steps_equal_one_pass_through_every_backend(family, backend):
    """transformers gives sdpa no mask here, neither for the prompt nor for a step."""
    model = patch_model(make_model(family), steer(family, backend=backend, normalize="none"))
    ids = prompt_for(family, rows=[[9], [9]])["input_ids"]
    said, cache = torch.randn(2, 6), DynamicCache(config=model.config)
    with use_saliency(model, Saliency.from_tokens(said)):
        steps = [model(ids[:, :6], **cached(cache)).logits]
        steps += [model(ids[:, at : at + 1], **cached(cache)).logits for at in range(6, 9)]
    whole = logits(model, {"input_ids": ids}, Saliency.from_tokens(torch.nn.functional.pad(said, (0, 3))))
    torch.testing.assert_close(torch.cat(steps, 1), whole, **TOLERANCE)
    with disable_steering(model):
        assert (logits(model, {"input_ids": ids}) - whole)[:, -1].abs().max() > 0.1


@torch.no_grad()
def test_a_mask_of_ones_own_may_be_one_for_all_rows():
    model = patch_model(make_model("qwen2"), steer("qwen2"))
    ids = prompt_for("qwen2", rows=[[9], [9]])["input_ids"]
    said = Saliency.from_tokens(torch.randn(2, 9))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    with use_saliency(model, said):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits, **TOLERANCE)


@every
def test_beams_and_returned_sequences_equal_a_repeated_batch(family, implementation):
    model = patch_model(make_model(family, implementation), steer(family))
    inputs = prompt_for(family)
    statement = gaze(family, inputs)
    single, steps = generate(model, inputs, statement)
    if repeats_pictures(family):
        with looking(model, statement):
            several = model.generate(
                **inputs, max_new_tokens=1, do_sample=True, num_return_sequences=3, return_dict_in_generate=True,
                output_logits=True,
            )
        torch.testing.assert_close(several.logits[0], steps[:, 0].repeat_interleave(3, 0), **TOLERANCE)
    with looking(model, statement):
        beams = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
    for row in range(len(single)):
        own = row_of(inputs, row, family)
        said = None
        if statement is not None:  # the row's own scores; padding said nothing
            said = Saliency.from_tokens(statement.tokens[row][inputs["attention_mask"][row].bool()])
        with looking(model, said):
            alone = model.generate(**own, max_new_tokens=4, do_sample=False, num_beams=3)
        assert torch.equal(beams[row, -4:], alone[0, -4:])


@every
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_rows_equal_their_unpadded_selves(family, implementation, padding):
    model = patch_model(make_model(family, implementation), steer(family))
    inputs = prompt_for(family, padding=padding)
    statement = gaze(family, inputs)
    batched = logits(model, inputs, statement)
    for row in range(len(batched)):
        keep = inputs["attention_mask"][row].bool()
        said = None if statement is None else Saliency.from_tokens(statement.tokens[row][keep])
        alone = logits(model, row_of(inputs, row, family), said)
        torch.testing.assert_close(batched[row][keep], alone[0], **TOLERANCE)


@every
def test_saved_and_loaded_gives_equal_outputs(family, implementation, tmp_path):
    model = patch_model(make_model(family, implementation), steer(family))
    inputs = prompt_for(family)
    steered = logits(model, inputs, gaze(family, inputs))
    model.save_pretrained(tmp_path)
    loaded = hf_steer.from_pretrained(tmp_path, attn_implementation=implementation)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded.eval(), inputs, gaze(family, inputs)), steered)


@every
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gives_the_gradients_of_the_mask(family, implementation, checkpointing):
    """Gradients through the folded channel, with and without recomputation, equal those through a dense mask."""
    inputs = prompt_for(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) < 2, -100)  # nothing is said out of padding
    gradients = []
    for backend, recompute in (("mask", False), ("folded", checkpointing)):
        model = make_model(family, implementation).train()
        if recompute:
            # the newer name warns not, the older one is there in 5.14
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        patch_model(model, steer(family, backend=backend))
        with looking(model, gaze(family, inputs)):
            model(**inputs, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


@sighted
@pytest.mark.filterwarnings("ignore:this call of a patched model says nothing about where to look")
def test_a_thread_that_follows_its_own_eyes_beside_others_that_are_told_equals_the_same_in_turn(family, implementation):
    model = patch_model(make_model(family, implementation), steer(family))
    inputs = prompt_for(family, rows=[[4, ("image", 2, 3), 5]])
    statements = [Saliency.from_tokens(torch.randn(inputs["input_ids"].shape) * 2) for _ in range(4)] + [gaze(family, inputs)]
    in_turn = [generate(model, inputs, statement, max_new_tokens=6)[1] for statement in statements]
    at_once = [None] * len(statements)

    def work(index):
        at_once[index] = generate(model, inputs, statements[index], max_new_tokens=6)[1]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(statements))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(in_turn[0], in_turn[1])
    for alone, together in zip(in_turn, at_once, strict=True):
        assert torch.equal(alone, together)


@every
def test_static_cache_equals_dynamic(family, implementation):
    model = patch_model(make_model(family, implementation), steer(family))
    inputs = prompt_for(family)
    statement = gaze(family, inputs)
    for _ in range(2):  # generate reuses and resets its static cache
        torch.testing.assert_close(
            generate(model, inputs, statement, cache_implementation="static")[1], generate(model, inputs, statement)[1],
            **TOLERANCE,
        )
    shorter = prompt_for(family, rows=[[3, ("image", 2, 2)]])
    said = gaze(family, shorter)
    torch.testing.assert_close(
        generate(model, shorter, said, cache_implementation="static")[1], generate(model, shorter, said)[1], **TOLERANCE
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen2", "qwen3"])
@pytest.mark.parametrize("static", [False, True])
def test_sliding_windows_steer_the_keys_that_are_left(family, implementation, static):
    """A sliding layer's keys start at an offset: decode must equal one pass without a cache."""
    sliding = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    model = patch_model(make_model(family, implementation, **sliding), steer(family))
    assert "sliding_attention" in model.config.get_text_config().layer_types
    inputs = prompt_for(family, rows=[[4, ("image", 2, 3), 5]])
    statement = gaze(family, inputs)
    cache = {"cache_implementation": "static"} if static else {}
    cached = generate(model, inputs, statement, max_new_tokens=6, **cache)
    uncached = generate(model, inputs, statement, max_new_tokens=6, use_cache=False)
    assert torch.equal(cached[0], uncached[0])
    torch.testing.assert_close(cached[1], uncached[1], **TOLERANCE)


@every
def test_generation_without_a_cache_equals_generation_with_one_where_mass_is_preserved(family, implementation):
    model = patch_model(make_model(family, implementation), steer(family, preserve_mass=True))
    inputs = prompt_for(family)
    statement = gaze(family, inputs)
    torch.testing.assert_close(
        generate(model, inputs, statement, use_cache=False)[1], generate(model, inputs, statement)[1], **TOLERANCE
    )


@pytest.mark.parametrize(("family", "implementation"), CHUNKABLE)
@pytest.mark.parametrize(
    ("queries", "chunk", "preserve_mass"), [("all", 1, False), ("all", 5, True), ("generated", 1, True), ("generated", 5, False)]
)
def test_chunked_prefill_equals_prefill(family, implementation, queries, chunk, preserve_mass):
    """Each value of one beside each value of another."""
    model = patch_model(make_model(family, implementation), steer(family, queries=queries, preserve_mass=preserve_mass))
    inputs = prompt_for(family)
    statement = gaze(family, inputs)
    torch.testing.assert_close(
        generate(model, inputs, statement, prefill_chunk_size=chunk)[1], generate(model, inputs, statement)[1], **TOLERANCE
    )


@every
@pytest.mark.parametrize("static", [False, True])
def test_a_second_turn_on_a_reused_cache_equals_the_whole_conversation(family, implementation, static):
    model = patch_model(make_model(family, implementation), steer(family, normalize="minmax"))
    first = prompt_for(family, rows=[[4, ("image", 2, 3), 5]])
    length = first["input_ids"].shape[1]
    ids = torch.cat([first["input_ids"], torch.tensor([[5, 9, 11, 12]])], 1)
    whole = dict(first, input_ids=ids, attention_mask=torch.ones_like(ids))
    if family in SEEING:
        whole["mm_token_type_ids"] = torch.cat([first["mm_token_type_ids"], torch.zeros(1, 4, dtype=torch.int)], 1)
    said = None if family in SEEING else Saliency.from_tokens(torch.rand(1, length))
    cache = (
        StaticCache(config=model.config.get_text_config(), max_cache_len=40)
        if static
        else DynamicCache(config=model.config.get_text_config())
    )
    logits(model, first, said, **cached(cache))
    with torch.no_grad():  # says nothing new: the old saliency stays with its keys
        second = model(input_ids=ids[:, length:], **cached(cache)).logits
    if said is not None:
        from hf_steer.saliency import normalize
        from hf_steer.values import TokenScores

        scores = normalize(TokenScores(said.tokens, torch.zeros_like(said.tokens).long()), "minmax", 3.0).values
        said = Saliency.from_tokens(torch.cat([scores, torch.zeros(1, 4)], 1))
        patch_model(unpatch_model(model), steer(family, normalize="none"))
    torch.testing.assert_close(second, logits(model, whole, said)[:, length:], **TOLERANCE)


@every
def test_a_second_generate_on_a_reused_cache_keeps_the_saliency(family, implementation):
    model = patch_model(make_model(family, implementation), steer(family))
    inputs = prompt_for(family, rows=[[4, ("image", 2, 3), 5]])
    statement = gaze(family, inputs)
    with looking(model, statement):
        first = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[5, 9, 11]])], 1)
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in SEEING:
        again["mm_token_type_ids"] = torch.zeros_like(ids).int()
    kept, lost = copy.deepcopy(cache_of(first)), copy.deepcopy(cache_of(first))
    with_state = generate(model, dict(again, **cached(kept)))[1]
    with disable_steering(model):
        without = generate(model, dict(again, **cached(lost)))[1]
    assert (with_state - without).abs().max() > 1e-3
    manual = copy.deepcopy(cache_of(first))
    past = manual.get_seq_length()
    with torch.no_grad():
        step = model(input_ids=ids[:, past:], **cached(manual)).logits[:, -1]
    torch.testing.assert_close(step, with_state[:, 0], **TOLERANCE)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_same_model_in_float32(family, implementation, dtype):
    """The steering's own rounding may not be worse than the model's: at most twice the unsteered model's error."""
    inputs = prompt_for(family)
    statement = gaze(family, inputs)
    errors = {}
    for strength in (0.0, 1.7):
        outputs = []
        for kind in (dtype, torch.float32):
            model = make_model(family, implementation).to(dtype).to(kind)  # both hold the rounded weights
            patch_model(model, steer(family, strength=strength))
            own = {name: value.to(kind) if value.is_floating_point() else value for name, value in inputs.items()}
            outputs.append(real_logits(logits(model, own, statement).float(), inputs))
            assert torch.isfinite(outputs[-1]).all()
        errors[strength] = (outputs[0] - outputs[1]).pow(2).mean().sqrt()
    assert errors[1.7] < 2 * errors[0.0] + 1e-6


@every
def test_inputs_embeds_take_saliency_and_need_none(family, implementation):
    model = make_model(family, implementation)
    inputs = prompt_for(family, rows=[[9], [6]])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    called = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    plain, said_plainly = logits(model, called), generate(model, called)[1] if generates_from_embeds(model) else None
    patch_model(model, steer(family))
    refusal = pytest.raises(hf_steer.SaliencyError, match=r"inputs_embeds came without input_ids.*Saliency\.from_tokens")
    if hf_steer.get_steer_status(model).steers:  # its own eyes ask where the pictures are
        with refusal:
            logits(model, called)
    else:
        assert torch.equal(logits(model, called), plain)
    statement = Saliency.from_tokens(torch.randn(inputs["input_ids"].shape))
    ids_only = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(logits(model, called, statement), logits(model, ids_only, statement))
    if said_plainly is not None:
        torch.testing.assert_close(generate(model, called, statement)[1], generate(model, ids_only, statement)[1])
        if hf_steer.get_steer_status(model).steers:
            with refusal:
                generate(model, called)
        else:
            assert torch.equal(generate(model, called)[1], said_plainly)


@pytest.mark.parametrize(("family", "implementation"), SIGHTED if ENCODES_FIRST else [])
def test_encoder_outputs_that_the_caller_computed_keep_their_saliency(family, implementation):
    model = patch_model(make_model(family, implementation), steer(family))
    inputs = prompt_for(family)
    expected = logits(model, inputs)
    tokens = generate(model, inputs)[1]
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}

    def encode():
        return {"image": model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)}

    with torch.no_grad():
        torch.testing.assert_close(logits(model, without, mm_encoder_outputs=encode()), expected)
        torch.testing.assert_close(generate(model, dict(without, mm_encoder_outputs=encode()))[1], tokens)
        with disable_steering(model):
            foreign = encode()
    with pytest.raises(hf_steer.SaliencyError, match="the vision tower of the patched model did not compute them"):
        logits(model, without, mm_encoder_outputs=foreign)
    said = Saliency.from_tokens(torch.randn(inputs["input_ids"].shape))
    torch.testing.assert_close(logits(model, without, said, mm_encoder_outputs=foreign), logits(model, inputs, said))


@sighted
def test_video_is_steered_frame_by_frame(family, implementation):
    model = make_model(family, implementation)
    inputs = prompt_for(family, rows=[[3, ("image", 2, 2), 2, ("video", 3, 2, 3), 4], [2, ("video", 2, 2, 2), 5]])
    plain = logits(model, inputs)
    patch_model(model, steer(family))
    steered = logits(model, inputs)
    assert (steered - plain).abs().max() > 0.05
    torch.testing.assert_close(generate(model, inputs)[1][:, 0], steered[:, -1], **TOLERANCE)
    told = Saliency.from_boxes((0, 0, 50, 100), (100, 100), video=0, frames=(2, 4)) + Saliency.from_mask(
        torch.eye(8), row=1, video=0
    )
    assert (logits(model, inputs, told) - steered).abs().max() > 0.05


@sighted
def test_rows_without_pictures_are_not_steered(family, implementation):
    model = make_model(family, implementation)
    inputs = prompt_for(family)
    plain = logits(model, inputs)
    patch_model(model, steer(family))
    steered = logits(model, inputs)
    keep = inputs["attention_mask"][1].bool()
    torch.testing.assert_close(steered[1][keep], plain[1][keep], **TOLERANCE)
    assert (steered[0] - plain[0]).abs().max() > 0.1
    text = prompt_for(family, rows=[[9], [6]])
    with disable_steering(model):
        unsteered = logits(model, text)
    assert torch.equal(logits(model, text), unsteered)


@every
def test_generated_queries_leave_the_prompt_alone_but_for_its_last_token(family, implementation):
    model = make_model(family, implementation)
    inputs = prompt_for(family)
    plain = logits(model, inputs)
    patch_model(model, steer(family, queries="generated", heads={LAYERS - 1: tuple(range(HEADS))}))
    steered = logits(model, inputs, gaze(family, inputs))
    torch.testing.assert_close(real_logits(steered[:, :-1], {"attention_mask": inputs["attention_mask"][:, :-1]}),
                               real_logits(plain[:, :-1], {"attention_mask": inputs["attention_mask"][:, :-1]}), **TOLERANCE)
    assert (steered[0, -1] - plain[0, -1]).abs().max() > 0.05
    sequences, steps = generate(model, inputs, gaze(family, inputs))
    torch.testing.assert_close(steps[:, 0], steered[:, -1], **TOLERANCE)
    # with labels on what was generated, one pass steers the same queries
    new = sequences[:, inputs["input_ids"].shape[1] :]
    whole = dict(inputs, input_ids=sequences, attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1))
    if family in SEEING:
        whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(new).int()], 1)
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), new], 1)
        one_pass = logits(model, whole, labels=labels)[:, -5:-1]
        torch.testing.assert_close(one_pass, steps, **TOLERANCE)


@every
def test_right_padding_and_generated_queries_steer_each_rows_last_real_token(family, implementation):
    model = make_model(family, implementation)
    inputs = prompt_for(family, padding="right")
    plain = logits(model, inputs)
    patch_model(model, steer(family, queries="generated", heads={LAYERS - 1: "all"}))
    steered = logits(model, inputs, gaze(family, inputs))
    moved = (steered - plain).abs().amax(-1)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        if family in SEEING and row == 1:
            continue  # no picture, nothing to look at
        assert moved[row].argmax() == length - 1
        assert moved[row][: length - 1].max() < 1e-4 < moved[row][length - 1]


@every
def test_no_padding_token_is_ever_looked_at(family, implementation):
    """Saliency on padding must not open it: scores there change nothing."""
    model = patch_model(make_model(family, implementation), steer(family, normalize="none"))
    inputs = prompt_for(family)
    scores = torch.randn(inputs["input_ids"].shape)
    loud = scores.masked_fill(inputs["attention_mask"] == 0, 50.0)
    with torch.no_grad(), use_saliency(model, Saliency.from_tokens(loud)):
        state = cache_of(model(**inputs, use_cache=True)).hf_steer_state
    torch.testing.assert_close(state.scores.values, scores * inputs["attention_mask"], rtol=0, atol=0)
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == PAD).all()
    assert torch.equal(
        real_logits(logits(model, inputs, Saliency.from_tokens(scores)), inputs),
        real_logits(logits(model, inputs, Saliency.from_tokens(loud)), inputs),
    )
