"""A model that was changed after it was patched, or while it runs: said at the next call, not steered by halves."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from kit.asking import generate, logits, look, plain_logits, prompt, right_or_refused, saying, steer, steered
from kit.tiny import make_model
from transformers import StoppingCriteria

from hf_steer import AttentionConfig, PatchError, SaliencyConfig, get_steer_status, patch_model, unpatch_model

REMEDY = "unpatch_model|patch_model|[Pp]atch"
families = pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])


def decoder_of(model):
    return model.get_decoder()


def replace_attention(model):
    layer = decoder_of(model).layers[1]
    layer.self_attn = copy.deepcopy(make_decoder(model).layers[1].self_attn)


def make_decoder(model):
    return make_model(model.config.model_type).get_decoder()


def replace_attention_config(model):
    decoder_of(model).layers[1].self_attn.config = decoder_of(model).config


def replace_layer(model):
    decoder_of(model).layers[1] = make_decoder(model).layers[1]


def replace_decoder(model):
    owner = model.model if hasattr(model.model, "language_model") else model
    setattr(owner, "language_model" if owner is not model else "model", make_decoder(model))


def clear_decoder_hooks(model):
    decoder_of(model)._forward_pre_hooks.clear()


def clear_root_hooks(model):
    model._forward_pre_hooks.clear()


def clear_every_hook(model):
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()


CHANGES = [
    replace_attention, replace_attention_config, replace_layer, replace_decoder, clear_decoder_hooks, clear_root_hooks,
    clear_every_hook,
]  # fmt: skip


@families
@pytest.mark.parametrize("call", [logits, generate])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_changed_is_said_or_does_not_matter(family, call, change):
    """A weight-equal replacement, so that a call that is steered all the same is right."""
    model, inputs = steered(family), prompt(family)
    said = saying(family, inputs)
    expected, plain = call(model, inputs, said), plain_logits(model, inputs)
    change(model)
    right_or_refused(lambda: call(model, inputs, said), expected, REMEDY)
    assert not torch.equal(expected, plain)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_statement_per_call_is_heeded_or_refused_by_a_changed_model(change):
    model, inputs = steered(), prompt()
    said = look(inputs)
    expected = logits(model, inputs, said)
    change(model)
    right_or_refused(lambda: logits(model, {**inputs, "saliency": said}), expected, REMEDY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_attention, r"layers.1.self_attn was replaced by a Qwen2Attention after patching"),
        (replace_attention_config, r"the config of model.layers.1.self_attn was replaced after patching.*names 'sdpa'"),
        (replace_layer, r"layers.1.self_attn is not the module that was patched; its layer was replaced"),
    ],
    ids=lambda own: getattr(own, "__name__", ""),
)
def test_the_refusal_says_what_was_replaced(change, message):
    model, inputs = steered(), prompt()
    change(model)
    with pytest.raises(PatchError, match=message):
        logits(model, inputs, look(inputs))


@pytest.mark.parametrize("change", [replace_attention, replace_attention_config], ids=lambda change: change.__name__)
def test_a_layer_whose_attention_is_read_and_not_steered_is_missed_when_it_was_replaced(change):
    """It signs no receipt; the first pass would read the other layers alone."""
    read = SaliencyConfig(source="decoder_attention", source_heads={0: (0,), 1: (0, 2)})
    model, inputs = make_model("qwen2_vl"), prompt("qwen2_vl")
    patch_model(model, AttentionConfig(heads={2: "all"}, strength=3.0, saliency=read))
    logits(model, inputs)
    change(model)
    with pytest.raises(PatchError, match="layers.1.self_attn was replaced"):
        logits(model, inputs)


@families
def test_a_changed_model_can_be_unpatched_and_patched_again(family):
    model, inputs = steered(family), prompt(family)
    said, config = saying(family, inputs), get_steer_status(model).config
    expected = logits(model, inputs, said)
    clear_root_hooks(model)
    unpatch_model(model)
    assert torch.equal(logits(patch_model(model, config), inputs, said), expected)


@families
def test_nothing_asked_of_a_changed_model_is_never_refused(family):
    model, inputs = steered(family, source=None), prompt(family)
    plain = logits(model, inputs)
    replace_attention(model)
    assert torch.equal(logits(model, inputs), plain)


class Waiting(StoppingCriteria):
    """Stops at its second token until somebody says go."""

    def __init__(self):
        self.inside, self.go, self.steps = threading.Event(), threading.Event(), 0

    def __call__(self, input_ids, scores, **kwargs):
        self.steps += 1
        if self.steps == 2:
            self.inside.set()
            assert self.go.wait(60)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def while_it_generates(model, inputs, said, act):
    """Do something in the middle of a generation in another thread; what that gives."""
    waiting, found = Waiting(), []
    thread = threading.Thread(target=lambda: found.append(generate(model, inputs, said, stopping_criteria=[waiting])))
    thread.start()
    assert waiting.inside.wait(60)
    try:
        act()
    finally:
        waiting.go.set()
        thread.join()
    return found[0]


@families
def test_unpatching_in_the_middle_of_a_generation_is_refused(family):
    model, inputs = steered(family), prompt(family)
    said = saying(family, inputs)
    expected = generate(model, inputs, said)

    def act():
        with pytest.raises(PatchError, match="running|in the middle|thread"):
            unpatch_model(model)

    assert torch.equal(while_it_generates(model, inputs, said, act), expected)
    assert get_steer_status(unpatch_model(model)).patched is False  # now nobody runs it


@families
def test_patching_in_the_middle_of_a_generation_is_refused_or_does_not_reach_it(family):
    """Nothing of ours is in an unpatched model that could count who runs it."""
    model, inputs = make_model(family), prompt(family)
    expected = generate(model, inputs)

    def act():
        try:
            patch_model(model, steer(family))
        except PatchError:
            assert not get_steer_status(model).patched

    found = while_it_generates(model, inputs, None, act)
    assert torch.equal(found, expected)


def test_patching_anew_in_the_middle_of_a_generation_is_refused():
    model, inputs = steered("qwen2"), prompt("qwen2")
    said = saying("qwen2", inputs)
    expected = generate(model, inputs, said)

    def act():
        with pytest.raises(PatchError):
            patch_model(model, steer("qwen2", strength=-3.0))
        assert get_steer_status(model).config.attention.strength == 3.0

    assert torch.equal(while_it_generates(model, inputs, said, act), expected)


@families
def test_unpatching_in_the_middle_of_a_pass_is_refused(family):
    model, inputs = steered(family), prompt(family)
    said = saying(family, inputs)
    expected = logits(model, inputs, said)
    inside, go, found = threading.Event(), threading.Event(), []

    def wait(module, args):
        inside.set()
        assert go.wait(60)

    hook = decoder_of(model).layers[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.append(logits(model, inputs, said)))
    thread.start()
    assert inside.wait(60)
    try:
        with pytest.raises(PatchError, match="running|in the middle|thread"):
            unpatch_model(model)
    finally:
        go.set()
        thread.join()
    hook.remove()
    assert torch.equal(found[0], expected)
    unpatch_model(model)


@families
def test_a_call_that_failed_runs_no_more(family):
    """Or a model whose call was interrupted could never be unpatched."""
    model, inputs = steered(family), prompt(family)
    for error in (MemoryError("injected"), KeyboardInterrupt()):

        def stop(module, args, error=error):
            raise error

        hook = decoder_of(model).layers[1].register_forward_pre_hook(stop)
        for call in (logits, generate):
            with pytest.raises(type(error)):
                call(model, inputs, saying(family, inputs))
        hook.remove()
    assert not get_steer_status(unpatch_model(model)).patched
