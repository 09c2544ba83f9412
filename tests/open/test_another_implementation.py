"""`set_attn_implementation` after patching: what steers goes with the model, or says that it cannot once something is asked."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from kit.asking import TOLERANCE, generate, logits, look, prompt, saying, steered
from kit.tiny import make_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_steer import PatchError, disable_steering, unpatch_model
from hf_steer.analysis import attention_metrics

FAMILIES = ["qwen2", "qwen2_vl", "llama"]
every = pytest.mark.parametrize("family", FAMILIES)
moves = pytest.mark.parametrize(("was", "now"), [("sdpa", "eager"), ("eager", "sdpa")])


def plain_model(family, implementation):
    return make_model(family, implementation)


def padded(family):
    """Two rows, the first of which is padded on the left where it is text."""
    inputs = prompt(family, rows=2)
    if family != "qwen2_vl":
        inputs["attention_mask"][0, :3] = 0
    return inputs


@every
@moves
def test_a_model_of_which_nothing_is_asked_runs_plain_on_the_new_one(family, was, now):
    """Bit for bit: the masks that it makes are the new one's."""
    model, inputs = steered(family, implementation=was, source=None), padded(family)
    model.set_attn_implementation(now)
    expected = logits(plain_model(family, now), inputs)
    assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(generate(model, inputs), generate(plain_model(family, now), inputs))
    with disable_steering(model):
        assert torch.equal(logits(model, inputs, look(inputs)), expected)
    assert torch.equal(logits(unpatch_model(model), inputs), expected)
    assert model.get_decoder().layers[1].self_attn.config is model.get_decoder().config


@every
@moves
def test_what_is_asked_is_steered_on_the_new_one(family, was, now):
    inputs = padded(family)
    model, other = steered(family, implementation=was), steered(family, implementation=now)
    said = saying(family, inputs)
    before = logits(model, inputs, said)
    model.set_attn_implementation(now)
    found = logits(model, inputs, said)
    assert torch.equal(found, logits(other, inputs, said))
    real = inputs["attention_mask"].bool()  # padding sees nothing, of which implementations make what they like
    torch.testing.assert_close(found[real], before[real], **TOLERANCE)
    assert not torch.allclose(found, logits(plain_model(family, now), inputs), atol=1e-2)
    assert torch.equal(generate(model, inputs, said), generate(other, inputs, said))
    model.set_attn_implementation(was)
    assert torch.equal(logits(model, inputs, said), before)


def test_each_part_of_a_model_goes_with_its_own():
    model, inputs = steered("qwen2_vl"), prompt("qwen2_vl")
    other = make_model("qwen2_vl")
    for own in (model, other):
        own.set_attn_implementation({"vision_config": "eager"})
    before = logits(steered("qwen2_vl"), inputs)
    found = logits(model, inputs)
    torch.testing.assert_close(found, before, atol=1e-4, rtol=1e-3)  # the scores themselves come out of the other kernel
    with disable_steering(model):
        assert torch.equal(logits(model, inputs), logits(other, inputs))


@pytest.fixture
def foreign(monkeypatch):
    """An implementation of somebody else's, which hf_steer knows nothing of."""
    for table, function in ((AttentionInterface, sdpa_attention_forward), (AttentionMaskInterface, sdpa_mask)):
        monkeypatch.setitem(table._global_mapping, "foreign", function)
    return "foreign"


@every
def test_one_that_cannot_be_steered_runs_plain_until_something_is_asked(family, foreign):
    model, inputs = steered(family, source=None), prompt(family)
    plain = plain_model(family, "sdpa")
    model.set_attn_implementation(foreign)
    assert torch.equal(logits(model, inputs), logits(plain, inputs))
    refused = r"the decoder runs attention implementation 'foreign' since .* can steer eager, sdpa.*Set one that .*\('sdpa'\)"
    for call in (logits, generate):
        with pytest.raises(PatchError, match=refused):
            call(model, inputs, look(inputs))
    with disable_steering(model):
        assert torch.equal(logits(model, inputs, look(inputs)), logits(plain, inputs))
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, inputs, look(inputs)), logits(steered(family, source=None), inputs, look(inputs)))


def test_a_tower_that_cannot_be_watched_is_refused_where_its_eyes_are_asked_for(foreign):
    model, inputs = steered("qwen2_vl"), prompt("qwen2_vl")
    model.set_attn_implementation({"vision_config": foreign})
    with pytest.raises(PatchError, match="the vision tower runs attention implementation 'foreign' since"):
        logits(model, inputs)


@every
def test_copies_and_pickles_go_with_theirs(family):
    inputs = prompt(family)
    model = steered(family)
    model.set_attn_implementation("eager")
    expected = logits(steered(family, implementation="eager"), inputs, saying(family, inputs))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, inputs, saying(family, inputs)), expected)
    assert torch.equal(logits(model, inputs, saying(family, inputs)), expected)


@moves
def test_a_measurement_right_after_the_change_sees_what_runs_and_leaves_it_so(was, now):
    """A probe lies over the function of the new one, and takes nothing away from what goes with the model."""
    inputs = padded("qwen2")
    model, other = steered("qwen2", implementation=was), steered("qwen2", implementation=now)
    said = look(inputs)
    model.set_attn_implementation(now)
    found, expected = (attention_metrics(own, inputs, span=None, layers=[1]) for own in (model, other))
    torch.testing.assert_close(found.entropy_nats, expected.entropy_nats)
    assert torch.equal(logits(model, inputs, said), logits(other, inputs, said))
