"""A statement holds for the thread that entered its block; a call in another thread that says nothing is told so, once."""

from __future__ import annotations

import contextvars
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kit.asking import generate, logits, look, plain_generate, plain_logits, prompt, saying, steered

from hf_steer import Saliency, disable_steering, use_saliency

TOLD = r"(?s)saliency=.*disable_steering|disable_steering.*saliency="


@pytest.fixture
def asked():
    model, inputs = steered("qwen2"), prompt("qwen2")
    return model, inputs, look(inputs)


def in_a_thread(work):
    """What it returns, and the warnings that it gave; errors come back, too."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0], [warning for warning in heard if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize("call", [logits, generate])
def test_a_call_that_says_nothing_beside_a_statement_elsewhere_is_told_once(asked, call):
    model, inputs, said = asked
    with use_saliency(model, said):
        _, heard = in_a_thread(lambda: call(model, inputs))
        assert len(heard) == 1
        assert heard[0].category is UserWarning
        assert "saliency=" in str(heard[0].message)
        assert "disable_steering" in str(heard[0].message)
        assert in_a_thread(lambda: call(model, inputs))[1] == []


def test_a_pool_is_told_once_too(asked):
    model, inputs, said = asked
    with use_saliency(model, said), ThreadPoolExecutor(2) as pool, pytest.warns(UserWarning, match=TOLD) as heard:
        found = list(pool.map(lambda _: logits(model, inputs), range(4)))
    assert len(heard) == 1
    assert all(torch.equal(one, plain_logits(model, inputs)) for one in found)


def test_a_call_that_switches_off_is_not_told(asked):
    model, inputs, said = asked
    with use_saliency(model, said):
        found, heard = in_a_thread(lambda: plain_generate(model, inputs))
    assert heard == []
    assert torch.equal(found, plain_generate(model, inputs))


def test_a_call_with_its_own_statement_is_not_told(asked):
    model, inputs, said = asked
    other = look(inputs, seed=1)
    with use_saliency(model, said):
        found, heard = in_a_thread(lambda: generate(model, inputs, other))
        assert heard == []
        passed, heard = in_a_thread(lambda: generate(model, inputs, saliency=other))
        assert heard == []
    assert torch.equal(found, generate(model, inputs, other))
    assert torch.equal(passed, found)


def test_a_thread_that_took_the_context_along_is_not_told(asked):
    model, inputs, said = asked
    with use_saliency(model, said):
        context = contextvars.copy_context()
        found, heard = in_a_thread(lambda: context.run(generate, model, inputs))
    assert heard == []
    assert torch.equal(found, generate(model, inputs, said))


def test_nobody_is_told_once_the_block_has_ended(asked):
    model, inputs, said = asked
    with use_saliency(model, said):
        pass
    found, heard = in_a_thread(lambda: generate(model, inputs))
    assert heard == []
    assert torch.equal(found, plain_generate(model, inputs))


def test_nobody_is_told_of_a_statement_per_call(asked):
    """It belongs to that call, and not to what else runs meanwhile."""
    model, inputs, said = asked
    inside, go = threading.Event(), threading.Event()

    def wait(module, args, kwargs):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go.wait(60)

    hook = model.get_decoder().layers[0].register_forward_pre_hook(wait, with_kwargs=True)
    thread = threading.Thread(target=lambda: logits(model, inputs, saliency=said))
    thread.start()
    assert inside.wait(60)
    try:
        assert torch.equal(logits(model, inputs), plain_logits(model, inputs))  # warnings are errors
    finally:
        go.set()
        thread.join()
        hook.remove()


def test_another_models_statement_is_none_of_this_ones_business(asked):
    model, inputs, said = asked
    other = steered("qwen2", seed=1)
    with use_saliency(other, said):
        assert in_a_thread(lambda: generate(model, inputs))[1] == []


def test_own_eyes_beside_a_box_elsewhere_are_told_too():
    model, inputs = steered("qwen2_vl"), prompt("qwen2_vl")
    expected = generate(model, inputs, saying("qwen2_vl", inputs))
    with use_saliency(model, Saliency.from_boxes((0, 0, 10, 10), (30, 30))):
        found, heard = in_a_thread(lambda: generate(model, inputs))
    assert [warning.category for warning in heard] == [UserWarning]
    assert torch.equal(found, expected)


def test_a_switch_in_another_thread_is_no_statement(asked):
    model, inputs, said = asked
    with disable_steering(model):
        found, heard = in_a_thread(lambda: generate(model, inputs, said))
    assert heard == []
    assert torch.equal(found, generate(model, inputs, said))
