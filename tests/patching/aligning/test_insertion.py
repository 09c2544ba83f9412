"""The contract for aligners: every family with an ear or an eye × every placement."""

from __future__ import annotations

import copy
import dataclasses
import threading

import numpy as np
import pytest
import torch
from kit.aligning import (
    MASKED,
    PROMPTED,
    THREADED,
    TOLERANCE,
    align,
    aligned,
    every,
    generate,
    logits,
    prompted,
    row_of,
    stir,
    whole,
)
from kit.tiny import SEEING, make_model, make_prompt
from kit.tiny_encoders import (
    ENCODING,
    LISTENING,
    MELS,
    PLACEHOLDER,
    PROJECTING,
    labels_for,
    make_encoder_inputs,
    make_encoder_model,
)
from kit.versions import CHUNKS_PICTURES, repeats_pictures
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

import hf_steer
from hf_steer import (
    AlignerConfig,
    AlignerError,
    ConfigError,
    FileError,
    PatchError,
    SteerConfig,
    disable_steering,
    patch_model,
    unpatch_model,
)
from hf_steer.aligners import SteerMoEAligner
from hf_steer.attention import CURRENT_PASS
from hf_steer.training import record_routing


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


@pytest.mark.parametrize("family", ENCODING)
def test_what_is_read_next_is_what_the_aligner_gave(family):
    """By hand: the features at the encoder's outlet, through the aligner as a pure module, into the unpatched rest."""
    model = aligned(family, "output", "progressive")
    inputs = make_encoder_inputs(family)
    expected = logits(model, inputs)
    aligner = copy.deepcopy(model.hf_steer.aligners[0])
    encoder = model.hf_steer.plan.aligners[0].encoder
    unpatch_model(model)
    if encoder.reads:
        handle = encoder.outlet.register_forward_pre_hook(lambda module, args: (aligner(args[0]), *args[1:]))
    else:

        def after(module, args, output):
            output.last_hidden_state = aligner(output.last_hidden_state)

        handle = encoder.outlet.register_forward_hook(after)
    assert torch.equal(logits(model, inputs), expected)
    handle.remove()


@pytest.mark.parametrize("family", ENCODING)
def test_each_layer_gets_its_own_part_of_the_layer_wise_aligner(family):
    model = aligned(family, "layers", "layer_wise", layers=(0, -1))
    inputs = make_encoder_inputs(family)
    expected = logits(model, inputs)
    aligner = copy.deepcopy(model.hf_steer.aligners[0])
    sites = [site.module for site in model.hf_steer.plan.aligners[0].layers]
    assert aligner.layer_scales.shape == (2,)
    unpatch_model(model)
    handles = [
        site.register_forward_hook(
            lambda module, args, output, number=number: (
                (aligner(output[0], number), *output[1:]) if isinstance(output, tuple) else aligner(output, number)
            ),
            prepend=True,
        )
        for number, site in enumerate(sites)
    ]
    assert torch.equal(logits(model, inputs), expected)
    for handle in handles:
        handle.remove()


def test_hidden_states_that_the_encoder_returns_are_the_steered_ones():
    model = aligned("whisper", "output", "simple")
    inputs = make_encoder_inputs("whisper")
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
        encoded = model.get_encoder()(inputs["input_features"])
    assert torch.equal(out.encoder_hidden_states[-1], out.encoder_last_hidden_state)
    assert torch.equal(encoded.last_hidden_state, out.encoder_last_hidden_state)
    with torch.no_grad():
        reused = model(decoder_input_ids=inputs["decoder_input_ids"], encoder_outputs=encoded).logits
        assert torch.equal(model(**inputs, return_dict=False)[0], out.logits)
    torch.testing.assert_close(reused, out.logits)


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


@pytest.mark.parametrize(("family", "placement", "kind"), [case for case in PROMPTED if case[1] == "projector"])
def test_the_answer_is_never_read_by_the_aligner(family, placement, kind):
    model = aligned(family, placement, kind)
    inputs = make_encoder_inputs(family)
    labels = labels_for(family, inputs)
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][:, -1] = 7
    before, after = (logits(model, each, labels=labels) for each in (inputs, changed))
    real = inputs["attention_mask"].bool()[:, :-1]
    assert torch.equal(before[:, :-1][real], after[:, :-1][real])
    if kind != "simple":  # without labels all text is the prompt's, and a word of it matters
        assert not torch.equal(logits(model, inputs)[:2, :-1], logits(model, changed)[:2, :-1])


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
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_aligner_gets_gradients_and_the_base_none(family, placement, kind, checkpointing):
    model = aligned(family, placement, kind).train()
    if checkpointing:
        # the newer name warns not, the older one is there in 5.14
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    inputs = make_encoder_inputs(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels_for(family, inputs)).loss
        loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.hf_steer.parameters())
        assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("hf_steer."))
        optimizer.step()
        losses.append(loss.item())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("hf_steer."), name
    if checkpointing:
        model = aligned(family, placement, kind).train()
        again = model(**inputs, labels=labels_for(family, inputs)).loss.item()
        assert losses[0] == pytest.approx(again, rel=1e-5)


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


@pytest.mark.parametrize(("family", "placement", "kind"), MASKED)
def test_padded_frames_never_influence_real_ones(family, placement, kind):
    model = aligned(family, placement, kind)
    inputs = make_encoder_inputs(family)
    loud = dict(inputs)
    if family == "qwen2_audio":
        padded = inputs["feature_attention_mask"] == 0
        padded[:, 24:26] = padded[:, 17:19] = False  # what the convolutions' kernels reach
        loud["input_features"] = inputs["input_features"].masked_fill(padded.unsqueeze(1), 9.0)
        real = inputs["attention_mask"].bool()
    else:
        padded = inputs["attention_mask"] == 0
        padded[:, 251:275] = False
        loud["input_values"] = inputs["input_values"].masked_fill(padded, 9.0)
        count = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
        real = torch.arange(logits(model, inputs).shape[1])[None] < count[:, None]
    torch.testing.assert_close(logits(model, loud)[real], logits(model, inputs)[real], **TOLERANCE)
    labels = labels_for(family, inputs)
    model.train()  # where the load-balancing loss counts frames, too
    torch.testing.assert_close(*(model(**each, labels=labels).loss for each in (inputs, loud)))


@pytest.mark.parametrize("family", ["whisper", "qwen2_audio", "wav2vec2"])
def test_statistics_count_real_frames_alone(family):
    model = aligned(family, "output", "simple")
    inputs = make_encoder_inputs(family)
    mask = "feature_attention_mask" if family == "qwen2_audio" else "attention_mask"
    with record_routing(model) as listener:
        logits(model, inputs)
        told = listener.read()
        assert listener.read() == {}
    place = next(name for name in told if name.endswith("usage"))
    assert sum(told[place]) == pytest.approx(1.0)
    encoder, seen = model.hf_steer.plan.aligners[0].encoder, {}
    handles = [
        encoder.outlet.register_forward_pre_hook(lambda module, args: seen.update(read=args[0] if args else None)),
        encoder.outlet.register_forward_hook(lambda module, args, output: seen.update(given=output)),
    ]
    with disable_steering(model):
        logits(model, inputs)
    for handle in handles:
        handle.remove()
    features = seen["read"] if encoder.reads else seen["given"].last_hidden_state
    frames = features.shape[1]
    lengths = {
        "whisper": [20, 12, 20], "qwen2_audio": [10, 6, 4],
        "wav2vec2": None if family != "wav2vec2" else model._get_feat_extract_output_lengths(inputs[mask].sum(1)).tolist(),
    }[family]  # fmt: skip
    real = torch.arange(frames)[None] < torch.tensor(lengths)[:, None]
    _, routing = model.hf_steer.aligners[0](features, return_routing=True)
    expected = routing.scores["experts"][real].mean(0)
    torch.testing.assert_close(torch.tensor(told[place]), expected)


@pytest.mark.parametrize("family", ["whisper", "llava", "qwen2_audio", "wav2vec2"])
def test_the_load_balancing_loss_joins_the_loss_in_training_alone(family):
    model = aligned(family, "output", "simple", load_balancing_weight=0.5)
    inputs = make_encoder_inputs(family)
    labels = labels_for(family, inputs)
    silent = aligned(family, "output", "simple", load_balancing_weight=0.0)
    plain = silent.train()(**inputs, labels=labels).loss
    joined = model.train()(**inputs, labels=labels).loss
    assert 0.5 <= (joined - plain).item() <= 0.5 * 8
    as_tuple = model(**inputs, labels=labels, return_dict=False)[0]
    torch.testing.assert_close(as_tuple, joined)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, labels=labels).loss, plain)
    torch.testing.assert_close(model.eval()(**inputs, labels=labels).loss, plain)


@pytest.mark.parametrize("family", ["voxtral", "llava"])
def test_accumulated_steps_add_up_to_one(family):
    """Trainer divides by the items of the whole step; so does the load-balancing loss."""
    model = aligned(family, "output", "simple", load_balancing_weight=0.5).train()
    inputs = make_encoder_inputs(family)
    labels = labels_for(family, inputs)
    items = (labels[:, 1:] != -100).sum()
    whole_step = model(**inputs, labels=labels, num_items_in_batch=items).loss
    torch.testing.assert_close(whole_step, model(**inputs, labels=labels).loss)
    half = model(**inputs, labels=labels, num_items_in_batch=2 * items).loss
    torch.testing.assert_close(half, whole_step / 2)


def test_a_pass_that_is_interrupted_is_forgotten():
    """Python runs no hook on KeyboardInterrupt, not even those that always run."""
    model = aligned("llava", "output", "simple").train()
    inputs = make_encoder_inputs("llava")

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, labels=labels_for("llava", inputs))
    handle.remove()
    expected = logits(aligned("llava", "output", "simple"), inputs)
    assert torch.equal(model.eval()(**inputs).logits, expected)
    assert torch.isfinite(model(**inputs, labels=labels_for("llava", inputs)).loss)


def test_text_alone_trains_with_zeros():
    config = dataclasses.replace(align("llava", "output", "simple"), train_projector=True)
    model = patch_model(make_encoder_model("llava"), config)
    inputs = {name: value for name, value in make_encoder_inputs("llava").items() if name in ("input_ids", "attention_mask")}
    inputs = {name: value[2:, -6:] for name, value in inputs.items()}
    with torch.no_grad():
        plain = model(**inputs, labels=labels_for("llava", inputs)).loss
    loss = model.train()(**inputs, labels=labels_for("llava", inputs)).loss
    assert torch.equal(loss.detach(), plain)
    loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["cross_modal_adapter", "modality_specific"])
def test_training_never_shows_the_answer_to_an_aligner_that_reads_text(kind):
    model = aligned("llava", "projector", kind).train()
    inputs = make_encoder_inputs("llava")
    with pytest.raises(AlignerError, match="needs labels in training.*label smoothing"):
        model(**inputs)
    with pytest.raises(AlignerError, match="label the answer alone.*-100"):
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == PLACEHOLDER, 5))
    assert torch.isfinite(model.eval()(**inputs).logits).all()


def test_a_mask_of_four_dimensions_hides_padding_from_the_aligner_as_well():
    model = aligned("llava", "projector", "cross_modal_adapter")
    inputs = make_encoder_inputs("llava")
    real = inputs["attention_mask"].bool()
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    four = {**inputs, "attention_mask": (causal & real[:, None, :])[:, None], "position_ids": positions}
    two = {**inputs, "position_ids": positions}
    torch.testing.assert_close(logits(model, four)[real], logits(model, two)[real], **TOLERANCE)


def test_one_expert_of_many_keeps_its_probability_so_that_the_router_learns():
    module = SteerMoEAligner(16, 8, top_k=1, init="normal", init_scale=1.0)
    features = torch.randn(40, 16)
    steered, routing = module(features, return_routing=True)
    chosen = routing.probabilities["experts"].max(-1)
    torch.testing.assert_close(routing.scores["experts"].sum(-1), chosen.values)
    torch.testing.assert_close(steered, features + chosen.values[:, None] * module.steering_vectors[chosen.indices])
    steered.pow(2).sum().backward()
    assert module.router.weight.grad.abs().max() > 0.1


def test_layers_are_logged_under_their_own_numbers():
    model = aligned("whisper", "layers", "simple", layers=(-1,))
    with record_routing(model) as listener:
        logits(model, make_encoder_inputs("whisper"))
    assert {name.split("/")[0] for name in listener.read()} == {"audio.layers.2"}


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it itself
def test_compiled_training_has_the_same_loss_and_gradients():
    model = aligned("llava", "output", "simple", load_balancing_weight=0.5).train()
    inputs = make_encoder_inputs("llava", padding="right")
    labels = labels_for("llava", inputs)
    results = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = call(**inputs, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), [parameter.grad.clone() for parameter in model.hf_steer.parameters()]))
    torch.testing.assert_close(results[0], results[1], **TOLERANCE)


def steered_and_aligned(family):
    return SteerConfig(
        attention=hf_steer.AttentionConfig(strength=2.0, saliency=hf_steer.SaliencyConfig(source=None)),
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


@pytest.mark.parametrize("family", SEEING)
@pytest.mark.parametrize(("placement", "kind"), [("output", "simple"), ("projector", "cross_modal_adapter")])
def test_video_goes_through_the_same_aligner_as_pictures(family, placement, kind):
    inputs = make_prompt(family, [[3, ("image", 2, 2), 2, ("video", 3, 2, 3), 4], [2, ("video", 2, 2, 2), 5]])
    plain = logits(make_encoder_model(family), inputs)
    model = patch_model(make_encoder_model(family), align(family, placement, kind))
    assert torch.equal(logits(model, inputs), plain)
    stir(model)
    steered = logits(model, inputs)
    assert (steered[1] - plain[1]).abs().max() > 0.05  # the row that has nothing but a video
    torch.testing.assert_close(generate(model, inputs)[1][:, 0], steered[:, -1], **TOLERANCE)


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_sound_comes_in_through_the_real_feature_extractors(family):
    random = np.random.default_rng(0)
    sounds = [random.standard_normal(length).astype("float32") for length in (6400, 4000)]
    model = aligned(family, "layers", "layer_wise")
    if family == "whisper":
        extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1, hop_length=400)
        inputs = extractor(sounds, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
        assert model.generate(**inputs, max_new_tokens=4).shape[0] == 2
        inputs["decoder_input_ids"] = torch.ones(2, 3, dtype=torch.long)
    else:
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True)
        inputs = extractor(sounds, sampling_rate=16000, return_tensors="pt", padding=True)
        alone = extractor(sounds[1], sampling_rate=16000, return_tensors="pt")
        frames = logits(model, alone).shape[1]
        torch.testing.assert_close(logits(model, inputs)[1, :frames], logits(model, alone)[0], **TOLERANCE)
    with record_routing(model) as listener:
        steered = logits(model, inputs)
    assert len(listener.read()) == 3 * 3  # layers and statistics
    with disable_steering(model):
        assert (logits(model, inputs) - steered).abs().max() > 0.05


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("qwen2_vl", {"modality": "audio"}, "modality 'audio' was asked for, but 'qwen2_vl' has encoders for 'image'.*qwen2_audio"),
        ("whisper", {"modality": "image"}, "modality 'image' was asked for, but 'whisper' has encoders for 'audio'.*qwen2_vl"),
        ("whisper", {"modality": "audio", "placement": "projector"}, "'whisper' lacks; use placement='output' or 'layers'"),
        ("whisper", {"modality": "audio", "placement": "layers", "layers": (3,)}, r"layers \[3\] are not there.* 3 layers.*0 to 2"),
        ("llava", {"modality": "image", "placement": "layers", "layers": (2,)}, r"layers \[2\] are not .* 2 layers that are read"),
        ("whisper", {"modality": "audio", "placement": "layers", "layers": (0, -3)}, r"names a layer twice: \[0, -3\] of 3"),
        (
            "qwen2_audio",
            {"modality": "audio", "placement": "projector", "kind": "cross_modal_features", "hidden_dim": 12, "num_heads": 8},
            "num_heads must divide 12",
        ),
    ],
)
def test_an_aligner_that_does_not_fit_is_refused(family, config, message):
    model = make_encoder_model(family)
    inputs = make_encoder_inputs(family)
    plain = logits(model, inputs)
    with pytest.raises(ConfigError, match=message):
        patch_model(model, SteerConfig(aligners=(AlignerConfig(**config),)))
    assert not hf_steer.get_steer_status(model).patched
    assert torch.equal(logits(model, inputs), plain)


def test_a_text_only_model_is_sent_to_compose():
    with pytest.raises(ConfigError, match=r"'llama' has encoders for none.*see hf_steer\.compose"):
        patch_model(make_model("llama"), SteerConfig(aligners=(AlignerConfig(modality="audio"),)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modality": "smell"}, "aligner.modality must be one of 'image', 'audio'; got 'smell'"),
        ({"placement": "inside"}, "aligner.placement must be one of"),
        ({"kind": "random"}, "aligner.kind must be one of 'simple'"),
        ({"num_experts": 0}, "aligner.num_experts must be a whole number of at least 1; got 0"),
        ({"top_k": 9}, r"aligner.top_k must be at most num_experts \(8\); got 9"),
        ({"top_k": 0}, "aligner.top_k must be a whole number of at least 1"),
        ({"num_stages": 3}, "kind 'simple' has no num_stages; it has"),
        ({"kind": "progressive", "num_global_experts": 2}, "kind 'progressive' has no num_global_experts"),
        ({"kind": "progressive", "feedback": "all"}, "aligner.feedback must be one of"),
        ({"temperature": 0.0}, "aligner.temperature must be above 0"),
        ({"load_balancing_weight": -1.0}, "aligner.load_balancing_weight must be at least 0"),
        ({"kind": "layer_wise"}, "kind 'layer_wise' goes into layers; got placement='output'"),
        ({"kind": "cross_modal_adapter"}, "reads the prompt's text.*placement='projector'"),
        ({"layers": (0,)}, "aligner.layers is for placement='layers'"),
        ({"init": "ones"}, "aligner.init must be one of"),
    ],
)
def test_a_configuration_that_is_wrong_in_itself_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        AlignerConfig(**{"modality": "audio", **config})


def test_steer_config_takes_aligners_strictly():
    ear = AlignerConfig(modality="audio", kind="progressive", feedback="steering", placement="layers", layers=(0, -1))
    config = SteerConfig(aligners=[ear], train_projector=True)
    assert config.aligners == (ear,)
    assert SteerConfig.from_dict(config.to_dict()) == config
    assert SteerConfig(aligners=ear).aligners == (ear,)
    with pytest.raises(ConfigError, match="several for audio at 'layers'; one per modality and placement"):
        SteerConfig(aligners=(ear, ear))
    with pytest.raises(ConfigError, match="aligners must be a tuple of AlignerConfig"):
        SteerConfig(aligners=("progressive",))
    written = config.to_dict()
    written["aligners"][0]["num_expert"] = 3
    with pytest.raises(ConfigError, match=r"aligners\[0\] has no 'num_expert' \(did you mean 'num_experts'\?\)"):
        SteerConfig.from_dict(written)


@pytest.mark.parametrize(
    ("saved", "patched", "message"),
    [
        (("output", "simple", {}), ("output", "simple", {"num_experts": 4}), r"weight has shape \(8, 16\), needed is \(4, 16\)"),
        (("output", "simple", {}), ("output", "progressive", {}), "has aligners .*'simple'.* patched with .*'progressive'"),
        (("output", "simple", {}), ("layers", "simple", {}), "has aligners .*'output'.* patched with .*'layers'"),
    ],
)
def test_weights_of_another_shape_or_kind_are_refused(saved, patched, message, tmp_path):
    hf_steer.save_steering(aligned("whisper", saved[0], saved[1], **saved[2]), tmp_path)
    model = aligned("whisper", patched[0], patched[1], **patched[2])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FileError, match=message):
        hf_steer.load_steering(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_family_are_refused(tmp_path):
    hf_steer.save_steering(aligned("whisper", "output", "simple"), tmp_path)
    with pytest.raises(ConfigError, match="is for 'whisper'; this model is 'hubert'"):
        hf_steer.load_steering(aligned("hubert", "output", "simple"), tmp_path)


def test_broken_or_missing_weights_are_refused(tmp_path):
    model = aligned("whisper", "output", "simple")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "hf_steer" / "steer_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match="steer_model.safetensors cannot be read.*Save it again"):
        hf_steer.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileError, match="describes trained parts.*To start with fresh ones, give the configuration itself"):
        hf_steer.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"holds trained weights .* has no .*starts fresh"):
        fresh = hf_steer.from_pretrained(tmp_path, steer_config=SteerConfig.from_pretrained(tmp_path)).eval()
    inputs = make_encoder_inputs("whisper")
    with disable_steering(model):
        assert torch.equal(logits(fresh, inputs), logits(model, inputs))


def test_features_behind_the_projector_need_their_placeholders():
    model = aligned("qwen2_audio", "projector", "simple")
    inputs = make_encoder_inputs("qwen2_audio")
    short = {**inputs, "input_ids": inputs["input_ids"][2:], "attention_mask": inputs["attention_mask"][2:]}
    short["input_ids"] = torch.tensor([[5, PLACEHOLDER, 7]])
    short["attention_mask"] = torch.ones(1, 3, dtype=torch.long)
    short["input_features"], short["feature_attention_mask"] = inputs["input_features"][:1], inputs["feature_attention_mask"][:1]
    with pytest.raises(AlignerError, match="needs input_ids with one placeholder token per feature"):
        logits(model, short)


def test_a_prompt_without_words_is_refused():
    model = aligned("llava", "projector", "cross_modal_adapter")
    inputs = make_encoder_inputs("llava")
    ids = torch.full((1, 9), PLACEHOLDER)
    with pytest.raises(AlignerError, match=r"text of rows \[0\] has no real token"):
        logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"][:1]})


def test_freezing_needs_something_that_is_left_to_train():
    model = make_model("llama")
    config = SteerConfig(attention=hf_steer.AttentionConfig(saliency=hf_steer.SaliencyConfig(source=None)))
    with pytest.raises(ConfigError, match="freeze_base=True would leave nothing to train"):
        patch_model(model, config, freeze_base=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    patch_model(model, config)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_base_trains_along_when_it_is_not_frozen():
    model = patch_model(make_encoder_model("llava"), align("llava", "output", "simple"), freeze_base=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_with_nothing_trainable_is_refused():
    model = aligned("llava", "output", "simple").train()
    model.hf_steer.requires_grad_(False)
    inputs = make_encoder_inputs("llava")
    with pytest.raises(PatchError, match="there is nothing to train.*train_steering"):
        model(**inputs, labels=labels_for("llava", inputs))


def test_train_projector_needs_one():
    with pytest.raises(ConfigError, match="train_projector=True, but 'whisper' has no projector"):
        patch_model(make_encoder_model("whisper"), SteerConfig(train_projector=True))


@pytest.mark.parametrize("family", LISTENING[1:3])
def test_a_trained_projector_is_saved_with_the_steering(family, tmp_path):
    model = patch_model(make_encoder_model(family), SteerConfig(train_projector=True))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("multi_modal_projector" in name for name in trained)
    with torch.no_grad():
        for parameter in model.hf_steer.plan.projectors[0].parameters():
            parameter.add_(1.0)
    inputs = make_encoder_inputs(family)
    hf_steer.save_steering(model, tmp_path)
    fresh = patch_model(make_encoder_model(family), SteerConfig.from_pretrained(tmp_path))
    assert not torch.equal(logits(fresh, inputs), logits(model, inputs))
    hf_steer.load_steering(fresh, tmp_path)
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))
