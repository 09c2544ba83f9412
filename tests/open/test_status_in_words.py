"""What `get_steer_status` answers a person: does it steer, and if not, why not."""

from __future__ import annotations

import threading

import pytest
from kit.asking import look, prompt, steer, steered
from kit.tiny import make_model
from kit.tiny_encoders import make_encoder_model

from hf_steer import (
    AlignerConfig,
    Saliency,
    SteerConfig,
    disable_steering,
    get_steer_status,
    patch_model,
    use_saliency,
    use_strength,
)


def box():
    return Saliency.from_boxes((0, 0, 10, 10), (30, 30))


def test_a_model_with_eyes_steers():
    status = get_steer_status(steered("qwen2_vl"))
    assert status.steers is True
    assert status.why is None


def test_an_unpatched_model_says_how_to_patch():
    status = get_steer_status(make_model("qwen2"))
    assert status.steers is False
    assert "patch_model" in status.why
    assert "patch_model" in str(status)


def test_a_switched_off_model_says_where():
    model = steered("qwen2_vl")
    with disable_steering(model):
        status = get_steer_status(model)
        assert status.steers is False
        assert "disable_steering" in status.why
    assert get_steer_status(model).steers


def test_no_strength_says_so():
    status = get_steer_status(steered("qwen2_vl", strength=0.0))
    assert status.steers is False
    assert "strength" in status.why
    assert "0" in status.why


def test_a_strength_of_zero_for_a_while_says_so():
    model = steered("qwen2_vl")
    with use_strength(model, 0.0):
        status = get_steer_status(model)
        assert status.steers is False
        assert "strength" in status.why
    assert get_steer_status(model).steers


def test_nothing_said_says_how_to_say_it():
    model = steered("qwen2")
    status = get_steer_status(model)
    assert status.steers is False
    assert "use_saliency" in status.why or "saliency=" in status.why
    with use_saliency(model, look(prompt("qwen2"))):
        assert get_steer_status(model).steers is True
        assert get_steer_status(model).why is None


def test_another_threads_statement_does_not_steer_this_one():
    model, found = steered("qwen2"), []
    with use_saliency(model, look(prompt("qwen2"))):
        thread = threading.Thread(target=lambda: found.append(get_steer_status(model)))
        thread.start()
        thread.join()
    assert found[0].steers is False


def test_aligners_alone_steer():
    model = patch_model(make_encoder_model("llava"), SteerConfig(aligners=(AlignerConfig(modality="image"),)))
    status = get_steer_status(model)
    assert status.steers is True
    assert "image" in str(status)
    with disable_steering(model):
        assert get_steer_status(model).steers is False


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_it_reads_as_a_person_would_say_it(family):
    model = patch_model(make_model(family), steer(family, heads={1: (0, 3), -1: "all"}))
    text = str(get_steer_status(model))
    assert "SteerStatus(" not in text
    assert "AttentionConfig(" not in text
    assert "frozenset" not in text
    assert "FrozenMap" not in text
    assert family in text
    assert "6 heads" in text  # two and four, in two layers
    assert ("vision_attention" in text or "own eyes" in text) == (family == "qwen2_vl")
    assert "None" not in text


def test_it_names_who_speaks():
    model = steered("qwen2_vl")
    with use_saliency(model, box()):
        assert "user" in str(get_steer_status(model)) or "you" in str(get_steer_status(model))


@pytest.mark.parametrize("off", [True, False])
def test_why_not_is_read_out(off):
    model = steered("qwen2")
    if off:
        with disable_steering(model):
            status = get_steer_status(model)
            text = str(status)
    else:
        status = get_steer_status(model)
        text = str(status)
    assert status.why in text
    assert "not" in text or "off" in text


def test_a_plain_status_is_equal_to_itself_and_has_its_fields():
    """Programs read the fields; only people read the sentence."""
    model = steered("qwen2_vl")
    first, second = get_steer_status(model), get_steer_status(model)
    assert first == second
    assert (first.patched, first.enabled, first.family, first.saliency) == (True, True, "qwen2_vl", "vision_attention")
    assert first.config is second.config
