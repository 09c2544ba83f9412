"""The contract for aligners: every family with an ear or an eye × every placement."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from kit.aligning import THREADED, TOLERANCE, align, aligned, every, generate, logits, prompted, row_of, stir, whole
from kit.tiny_encoders import LISTENING, PROJECTING, labels_for, make_encoder_inputs, make_encoder_model
from kit.versions import CHUNKS_PICTURES, repeats_pictures

import hf_steer
from hf_steer import SteerConfig, disable_steering, patch_model, unpatch_model
from hf_steer.attention import CURRENT_PASS
from hf_steer.errors import AlignerError


@every
def test_a_fresh_aligner_changes_nothing_and_a_stirred_one_does(family, placement, kind):
    model = make_encoder_model(family)
    inputs = make_encoder_inputs(family)
    with torch.no_grad():
        plain = model(**inputs, labels=labels_for(family, inputs))
    patch_model(model, align(family, placement, kind))
    with torch.no_grad():
        fresh = model(**inputs, labels=labels_for(family, inputs))
    assert torch.equal(fresh.logits, plain.logits)
    assert torch.equal(fresh.loss, plain.loss)
    stir(model)
    assert (logits(model, inputs) - plain.logits).abs().max() > 0.05
    with disable_steering(model):
        assert torch.equal(logits(model, inputs), plain.logits)


@every
def test_a_fresh_aligner_changes_nothing_in_half_precision(family, placement, kind):
    """Where features that lie otherwise in memory are multiplied otherwise: LLaVA's projector reads a slice."""
    model = make_encoder_model(family).bfloat16()
    inputs = {name: own.bfloat16() if own.is_floating_point() else own for name, own in make_encoder_inputs(family).items()}
    plain = logits(model, inputs)
    patch_model(model, align(family, placement, kind))
    assert torch.equal(logits(model, inputs), plain)


@every
def test_unpatching_restores_everything(family, placement, kind):
    model = make_encoder_model(family)
    inputs = make_encoder_inputs(family)
    plain, keys = logits(model, inputs), list(model.state_dict())
    trained = [parameter.requires_grad for parameter in model.parameters()]
    modules = list(model.modules())
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_load_state_dict_post_hooks")
    before = [[len(getattr(module, kind)) for kind in kinds] for module in modules]
    attributes = [set(vars(module)) for module in modules]
    patch_model(model, align(family, placement, kind))
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if not name.startswith("hf_steer."))
    stir(model)
    logits(model, inputs)
    unpatch_model(model)
    assert list(model.modules()) == modules
    assert [[len(getattr(module, kind)) for kind in kinds] for module in modules] == before
    assert [set(vars(module)) for module in modules] == attributes
    assert list(model.state_dict()) == keys
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize(("family", "placement", "kind"), [("whisper", "layers", "layer_wise"), ("llava", "projector", "simple")])
def test_a_failure_at_any_edit_leaves_the_model_as_it_was(family, placement, kind, monkeypatch):
    from hf_steer.patching import handle

    model = make_encoder_model(family)
    inputs = make_encoder_inputs(family)
    plain = logits(model, inputs)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    real = handle.Steering.edits
    count = len(list(real(handle.Steering(hf_steer.patching.make_plan(model, align(family, placement, kind))))))
    assert count >= 6

    class Broken:
        def __enter__(self):
            raise MemoryError("injected")

        def __exit__(self, *_):
            raise AssertionError("never entered")

    for failing in range(count):
        monkeypatch.setattr(
            handle.Steering,
            "edits",
            lambda self, failing=failing: (Broken() if n == failing else edit for n, edit in enumerate(real(self))),
        )
        with pytest.raises(MemoryError, match="injected"):
            patch_model(model, align(family, placement, kind))
        assert not hf_steer.get_steer_status(model).patched
        assert [parameter.requires_grad for parameter in model.parameters()] == trained
        assert torch.equal(logits(model, inputs), plain)


@prompted
def test_prefill_and_decode_equal_one_pass(family, placement, kind):
    """With the answer labelled, a training step reads just the text that generation had read."""
    model = aligned(family, placement, kind)
    inputs = make_encoder_inputs(family)
    sequences, steps = generate(model, inputs)
    length = inputs["input_ids"].shape[1]
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), sequences[:, length:]], 1)
    one_pass = logits(model, whole(inputs, sequences), labels=labels)[:, length - 1 : -1]
    torch.testing.assert_close(steps, one_pass, **TOLERANCE)


@prompted
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_rows_equal_their_unpadded_selves(family, placement, kind, padding):
    model = aligned(family, placement, kind)
    inputs = make_encoder_inputs(family, padding=padding)
    batched = logits(model, inputs)
    for row in range(3):
        keep = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(batched[row][keep], logits(model, row_of(inputs, row, family))[0], **TOLERANCE)


@prompted
def test_beams_and_returned_sequences_equal_a_repeated_batch(family, placement, kind):
    model = aligned(family, placement, kind)
    inputs = make_encoder_inputs(family)
    one_by_one = family in LISTENING or (family.startswith("llava") and not repeats_pictures(family))
    if one_by_one:  # how transformers repeats sounds, and before 5.19 LLaVA's pictures: each row may have just one
        inputs = {name: value[1:] for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
        inputs |= {name: value[2:] for name, value in make_encoder_inputs(family).items() if name not in inputs}
    _, steps = generate(model, inputs)
    if one_by_one or repeats_pictures(family):
        several = model.generate(
            **inputs, max_new_tokens=1, do_sample=True, num_return_sequences=3, return_dict_in_generate=True, output_logits=True
        )
        torch.testing.assert_close(several.logits[0], steps[:, 0].repeat_interleave(3, 0), **TOLERANCE)
    beams = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
    every_row = make_encoder_inputs(family)
    first = 3 - len(beams)
    for row in range(len(beams)):
        alone = model.generate(**row_of(every_row, first + row, family), max_new_tokens=4, do_sample=False, num_beams=3)
        assert torch.equal(beams[row, -4:], alone[0, -4:])


@pytest.mark.parametrize("kind", ["progressive", "layer_wise"])
def test_whisper_generates_with_beams_from_steered_states(kind):
    model = make_encoder_model("whisper")
    inputs = {name: make_encoder_inputs("whisper")[name] for name in ("input_features", "attention_mask")}
    plain = model.generate(**inputs, max_new_tokens=6, num_beams=3)
    patch_model(model, align("whisper", "output" if kind == "progressive" else "layers", kind))
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, num_beams=3), plain)
    stir(model)
    greedy = model.generate(**inputs, max_new_tokens=6)
    assert not torch.equal(greedy, plain)
    with torch.no_grad():
        step = model(input_features=inputs["input_features"], decoder_input_ids=greedy[:, :-1]).logits[:, -1].argmax(-1)
    assert torch.equal(step, greedy[:, -1])


@pytest.mark.skipif(not CHUNKS_PICTURES, reason="before transformers 5.23 prompts with pictures could not be cut into chunks")
@pytest.mark.parametrize("kind", ["cross_modal_adapter", "modality_specific"])
def test_chunked_prefill_reads_the_whole_prompt(kind):
    model = aligned("qwen2_vl", "projector", kind)
    inputs = make_encoder_inputs("qwen2_vl")
    torch.testing.assert_close(generate(model, inputs, prefill_chunk_size=7)[1], generate(model, inputs)[1], **TOLERANCE)


@pytest.mark.skipif(not CHUNKS_PICTURES, reason="before transformers 5.23 prompts with pictures could not be cut into chunks")
def test_experts_are_merged_over_the_whole_prompt_or_not_at_all():
    model, inputs = aligned("qwen2_vl", "projector", "merged"), make_encoder_inputs("qwen2_vl")
    with pytest.raises(AlignerError, match="leave out prefill_chunk_size"):
        generate(model, inputs, prefill_chunk_size=7)
    whole = inputs["input_ids"].shape[1]
    torch.testing.assert_close(generate(model, inputs, prefill_chunk_size=whole)[1], generate(model, inputs)[1])


@every
def test_saved_and_loaded_gives_equal_outputs(family, placement, kind, tmp_path):
    model = aligned(family, placement, kind)
    inputs = make_encoder_inputs(family)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "all")
    loaded = hf_steer.from_pretrained(tmp_path / "all")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded.eval(), inputs), expected)
    plain = type(model).from_pretrained(tmp_path / "all").eval()  # anything can read the base
    with disable_steering(model):
        assert torch.equal(logits(plain, inputs), logits(model, inputs))
    hf_steer.save_steering(model, tmp_path / "steering")
    assert sorted(str(path.relative_to(tmp_path / "steering")) for path in (tmp_path / "steering").rglob("*.*")) == [
        "hf_steer/steer_model.safetensors", "steer_config.json",
    ]  # fmt: skip
    again = hf_steer.from_pretrained(tmp_path / "all", steer_config=tmp_path / "steering").eval()
    assert torch.equal(logits(again, inputs), expected)
    patch_model(plain, SteerConfig.from_pretrained(tmp_path / "steering"))
    hf_steer.load_steering(plain, tmp_path / "steering")
    assert torch.equal(logits(plain, inputs), expected)


@every
def test_a_deepcopy_is_independent(family, placement, kind):
    model = aligned(family, placement, kind)
    inputs = make_encoder_inputs(family)
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    stir(model, seed=8)
    assert not torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(twin, inputs), expected)
    unpatch_model(model)
    assert torch.equal(logits(twin, inputs), expected)
    plain = logits(model, inputs)
    unpatch_model(twin)
    assert torch.equal(logits(twin, inputs), plain)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_stays_near_float32(family, placement, kind, dtype):
    """The aligner's rounding may not be worse than the model's: at most twice its error, in the outputs' scale."""
    inputs = make_encoder_inputs(family)
    errors, sizes = {}, {}
    for steered in (False, True):
        outputs = []
        for kind_of in (dtype, torch.float32):
            model = make_encoder_model(family).to(dtype).to(kind_of)
            if steered:
                patch_model(model, align(family, placement, kind))
                stir(model)
                assert all(parameter.dtype == torch.float32 for parameter in model.hf_steer.parameters())
            own = {
                name: value.to(kind_of) if torch.is_tensor(value) and value.is_floating_point() else value
                for name, value in inputs.items()
            }
            outputs.append(logits(model, own).float())
            assert torch.isfinite(outputs[-1]).all()
        errors[steered] = (outputs[0] - outputs[1]).pow(2).mean().sqrt()
        sizes[steered] = outputs[1].pow(2).mean().sqrt()
    assert errors[True] < 2 * errors[False] * max(1.0, sizes[True] / sizes[False])


@pytest.mark.parametrize(("family", "placement", "kind"), THREADED)
def test_threads_equal_the_same_in_turn(family, placement, kind):
    model = aligned(family, placement, kind)
    batches = [make_encoder_inputs(family, seed=seed) for seed in range(4)]
    if family == "qwen2_vl":  # which keeps its positions on the module, so that threads need one prompt
        batches = [{**batches[0], "pixel_values": batch["pixel_values"]} for batch in batches]
    expected = [logits(model, batch) for batch in batches]
    found = [None] * len(batches)

    def run(number):
        found[number] = logits(model, batches[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_pass_that_fails_leaves_no_trace():
    model = aligned("qwen2_audio", "projector", "simple").train()
    inputs = make_encoder_inputs("qwen2_audio")
    broken = dict(inputs, input_features=inputs["input_features"][:, :, :-1])
    with pytest.raises(ValueError, match="expects the mel input features"):
        model(**broken, labels=labels_for("qwen2_audio", inputs))
    assert CURRENT_PASS.get() is None


@pytest.mark.parametrize(
    ("family", "placement", "kind"),
    [("whisper", "layers", "layer_wise"), ("whisper", "output", "progressive"), ("llava", "output", "hierarchical"),
     ("llava", "projector", "modality_specific")],
)  # fmt: skip
def test_a_patched_model_compiles_without_a_graph_break(family, placement, kind):
    model = aligned(family, placement, kind)
    inputs = make_encoder_inputs(family, padding="right")
    expected = logits(model, inputs)
    if family == "whisper":
        fast = torch.compile(model.get_encoder(), fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(
                fast(inputs["input_features"]).last_hidden_state, model.get_encoder()(inputs["input_features"]).last_hidden_state
            )
        return
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs).logits, expected, **TOLERANCE)


def steered_and_aligned(family):
    return SteerConfig(
        attention=hf_steer.AttentionConfig(queries="all", strength=2.0, saliency=hf_steer.SaliencyConfig(source=None)),
        aligners=align(family, "output", "progressive").aligners,
    )


@pytest.mark.parametrize("family", PROJECTING)
def test_ear_and_gaze_work_together(family, tmp_path):
    inputs = make_encoder_inputs(family)
    only = logits(aligned(family, "output", "progressive"), inputs)
    model = stirred(patch_model(make_encoder_model(family), steered_and_aligned(family)))
    with hf_steer.use_saliency(model, hf_steer.Saliency.from_tokens(torch.zeros(inputs["input_ids"].shape))):
        assert torch.equal(logits(model, inputs), only)
    said = hf_steer.Saliency.from_tokens(torch.randn(inputs["input_ids"].shape))
    with hf_steer.use_saliency(model, said):
        both = logits(model, inputs)
        _, steps = generate(model, inputs)
    assert (both - only).abs().max() > 0.05
    torch.testing.assert_close(steps[:, 0], both[:, -1], **TOLERANCE)
    model.save_pretrained(tmp_path)
    loaded = hf_steer.from_pretrained(tmp_path).eval()
    with hf_steer.use_saliency(loaded, said):
        assert torch.equal(logits(loaded, inputs), both)


def stirred(model):
    stir(model)
    return model
