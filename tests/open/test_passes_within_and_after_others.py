"""A pass counts for its own call alone: not after it was interrupted, not for calls within it, not in another thread."""

from __future__ import annotations

import contextvars
import gc
import os
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from kit.aligning import align, stir
from kit.asking import look, steer
from kit.tiny import make_model, make_prompt
from kit.tiny_encoders import labels_for, make_encoder_inputs, make_encoder_model

from hf_steer import AttentionConfig, SaliencyConfig, SteerConfig, disable_steering, patch_model, use_saliency
from hf_steer.training import record_routing

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))}
ROWS = [[3, ("image", 2, 3), 4]]


@pytest.fixture
def seeing():
    """A Qwen2-VL that looks where it is told, its prompt, and what is said."""
    model = patch_model(make_model("qwen2_vl"), steer("qwen2_vl", source=None))
    inputs = make_prompt("qwen2_vl", ROWS)
    return model, inputs, look(inputs)


def parts_alone(model, inputs):
    """The base model, and the decoder, called by themselves."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()

    @torch.no_grad()
    def base(**said):
        return model.model(**inputs, **said).last_hidden_state

    @torch.no_grad()
    def decoder(**said):
        return model.model.language_model(inputs_embeds=embeds, **said).last_hidden_state

    return base, decoder


def interrupt(module, call):
    """Ctrl-C in a module: torch runs no hook after it."""

    def stop(*_):
        raise KeyboardInterrupt

    hook = module.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        call()
    hook.remove()


def once(module, act):
    """Let something happen once, after a module ran."""
    done = []

    def hook(*_):
        if not done:
            done.append(None)
            done.append(act())

    handle = module.register_forward_hook(hook)
    return done, handle


@pytest.mark.parametrize("part", [0, 1], ids=["base", "decoder"])
def test_after_an_interrupted_call_the_parts_do_what_is_asked_of_them(seeing, part):
    model, inputs, said = seeing
    call = parts_alone(model, inputs)[part]
    with use_saliency(model, said):
        steered = call()
    with disable_steering(model):
        plain = call()
        interrupt(model.model.visual, lambda: model(**inputs))
    assert not torch.equal(steered, plain)
    assert torch.equal(call(saliency=said), steered)
    with disable_steering(model):
        interrupt(model.model.visual, lambda: model(**inputs))
    with use_saliency(model, said):
        assert torch.equal(call(), steered)
        interrupt(model.model.visual, lambda: model(**inputs))
    with disable_steering(model):
        assert torch.equal(call(), plain)


@pytest.mark.parametrize("part", [0, 1], ids=["base", "decoder"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["nested", "in a thread with the context"])
@pytest.mark.parametrize("block", [False, True], ids=["by itself", "by a block around it"])
def test_a_call_within_another_is_steered_as_is_said_of_it(seeing, part, elsewhere, block):
    model, inputs, said = seeing
    alone = parts_alone(model, inputs)[part]
    steered = alone(saliency=said)

    def call():
        if not block:
            return alone(saliency=said)
        with use_saliency(model, said):
            return alone()

    with torch.no_grad():
        outer = model(**inputs).logits

    def act():
        if not elsewhere:
            return call()
        found, context = [], contextvars.copy_context()
        thread = threading.Thread(target=lambda: found.append(context.run(call)))
        thread.start()
        thread.join()
        return found[0]

    done, handle = once(model.model.visual, act)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, outer)
    handle.remove()
    assert torch.equal(done[1], steered)


@pytest.mark.parametrize("gaze", [False, True])
@pytest.mark.parametrize("inner", ["root", "base"])
def test_the_rest_of_a_pass_goes_on_after_a_call_within_it(gaze, inner):
    config, inputs = align("llava", "projector", "simple"), make_encoder_inputs("llava")
    if gaze:
        config = SteerConfig(attention=AttentionConfig(saliency=SaliencyConfig(source=None)), aligners=config.aligners)
    model = patch_model(make_encoder_model("llava"), config)
    stir(model)
    with torch.no_grad():
        expected = model(**inputs).logits

    def act():
        with disable_steering(model), torch.no_grad():
            return (model if inner == "root" else model.model)(**inputs)

    once(model.model.vision_tower, act)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_a_reference_within_a_training_step_is_plain_and_adds_no_balance():
    model = patch_model(make_encoder_model("llava"), align("llava", "output", "simple", load_balancing_weight=0.5)).train()
    stir(model)
    inputs = make_encoder_inputs("llava")
    labels = labels_for("llava", inputs)
    with disable_steering(model), torch.no_grad():
        plain = model.model(**inputs).last_hidden_state
    loss = model(**inputs, labels=labels).loss.detach()

    def act():
        with disable_steering(model), torch.no_grad():
            return model.model(**inputs).last_hidden_state

    done, _ = once(model.model.language_model, act)
    assert torch.equal(model(**inputs, labels=labels).loss.detach(), loss)
    assert torch.equal(done[1], plain)


def test_features_that_a_pass_makes_inside_disable_steering_are_plain():
    model, inputs = patch_model(make_encoder_model("llava"), align("llava", "output", "simple")), make_encoder_inputs("llava")
    stir(model)
    with disable_steering(model), torch.no_grad():
        plain = model(**inputs).logits
    original = model.model.get_image_features

    def unsteered(*args, **kwargs):
        with disable_steering(model):
            return original(*args, **kwargs)

    model.model.get_image_features = unsteered
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_a_plain_reference_within_a_steered_pass_owes_no_bias(family):
    """Before the steered layers have run; where the base model is the decoder itself, too."""
    model = patch_model(make_model(family), steer(family, source=None))
    inputs = make_prompt(family, ROWS if family == "qwen2_vl" else [[9]])
    layers = model.get_decoder().layers

    def reference():
        with disable_steering(model), torch.no_grad():
            return model(**inputs).logits, model.model(**inputs).last_hidden_state

    plain = reference()
    with torch.no_grad():
        steered = model(**inputs, saliency=look(inputs)).logits
    done, handle = once(layers[0], reference)
    with torch.no_grad():
        assert torch.equal(model(**inputs, saliency=look(inputs)).logits, steered)
    handle.remove()
    assert all(torch.equal(found, expected) for found, expected in zip(done[1], plain, strict=True))


def test_routing_is_heard_where_generate_or_the_caller_encodes_first():
    model, inputs = patch_model(make_encoder_model("llava"), align("llava", "output", "simple")), make_encoder_inputs("llava")
    with record_routing(model) as listener, torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert listener.read()
        model.get_image_features(inputs["pixel_values"])
        assert listener.read()


def test_aligners_after_an_interrupted_call():
    model, inputs = patch_model(make_encoder_model("llava"), align("llava", "output", "simple")), make_encoder_inputs("llava")
    stir(model)

    @torch.no_grad()
    def features():
        return torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))

    steered = features()
    with disable_steering(model):
        plain = features()
        interrupt(model.model.language_model, lambda: model(**inputs))
    assert not torch.equal(steered, plain)
    assert torch.equal(features(), steered)
    interrupt(model.model.language_model, lambda: model(**inputs))
    with disable_steering(model):
        assert torch.equal(features(), plain)


def test_a_model_that_was_interrupted_is_freed_once_another_pass_has_run():
    kept, gone = (patch_model(make_model("qwen2"), steer("qwen2")) for _ in range(2))
    inputs = make_prompt("qwen2", [[9]])
    with use_saliency(gone, look(inputs)):
        interrupt(gone.model.layers[1].mlp, partial(gone, **inputs))
    with torch.no_grad():
        kept(**inputs, saliency=look(inputs))
    weights = weakref.ref(gone.model.embed_tokens.weight)
    sys.last_traceback = None
    del gone
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize("none", [0.0, 0])
def test_a_layer_that_drops_weights_shares_no_kernel_with_one_that_does_not(none):
    model, inputs = patch_model(make_model("qwen2"), steer("qwen2")).train(), make_prompt("qwen2", [[9]])
    ids, found = {"input_ids": inputs["input_ids"]}, []
    for second in (none, 0.9):
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.attention_dropout = second if number == 1 else none
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(model(**ids, saliency=look(inputs)).logits)
    assert not torch.equal(*found)


def test_a_frozen_strength_in_one_layer_does_not_decide_for_the_others():
    model = patch_model(make_model("qwen2"), steer("qwen2", strength="trainable")).train()
    inputs = make_prompt("qwen2", [[9]])
    learned = list(model.hf_steer.learned.parameters())
    learned[0].requires_grad_(False)
    ids = inputs["input_ids"]
    model(input_ids=ids, labels=ids, saliency=look(inputs)).loss.backward()
    assert learned[0].grad is None
    assert all(parameter.grad.abs().max() > 0 for parameter in learned[1:])


def test_the_first_call_of_a_process_may_be_compiled():
    code = (
        "import torch; from kit.asking import look, steer; from kit.tiny import make_model, make_prompt\n"
        "from hf_steer import patch_model\n"
        "inputs, model = make_prompt('qwen2', [[9]]), patch_model(make_model('qwen2'), steer('qwen2'))\n"
        "torch.set_grad_enabled(False)\n"
        "found = torch.compile(model, backend='aot_eager', fullgraph=True)(**inputs, saliency=look(inputs)).logits\n"
        "expected = model(**inputs, saliency=look(inputs)).logits\n"
        "torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)\n"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr[-2000:]
