"""Blocks may be closed in any order, thread and context: each ends what it began and nothing else."""

from __future__ import annotations

import asyncio
import contextvars
import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch
from kit.asking import generate, right_or_refused
from kit.blocks import BLOCKS, Subject
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model

from hf_steer import AlignerConfig, SteerConfig, get_steer_status, patch_model, trace_steering
from hf_steer.training import record_routing

every = pytest.mark.parametrize("name", list(BLOCKS))


@pytest.fixture
def subject():
    return Subject()


@every
def test_closed_crosswise_each_ends_its_own(subject, name):
    first, second = ExitStack(), ExitStack()
    first.enter_context(subject.block(name, 0))
    second.enter_context(subject.block(name, 1))
    expected = subject.now()
    first.close()
    assert torch.equal(subject.now(), expected)  # the second is still open
    second.close()
    assert torch.equal(subject.now(), subject.usual)
    assert not torch.equal(expected, subject.usual)


@pytest.mark.parametrize("names", [("use_saliency", "use_strength"), ("use_strength", "use_saliency"),
                                   ("use_saliency", "disable_steering"), ("use_strength", "disable_steering")])  # fmt: skip
def test_two_kinds_closed_crosswise(subject, names):
    stacks = [ExitStack(), ExitStack()]
    for stack, name in zip(stacks, names, strict=True):
        stack.enter_context(subject.block(name))
    expected = subject.inside(names[1])
    stacks[0].close()
    assert torch.equal(subject.now(), subject.inside(names[1]))
    stacks[1].close()
    assert torch.equal(subject.now(), subject.usual)
    assert not torch.equal(expected, subject.usual)


def test_a_switch_that_ends_first_leaves_nothing_on_for_good(subject):
    off, said = ExitStack(), ExitStack()
    off.enter_context(subject.block("disable_steering"))
    said.enter_context(subject.block("use_saliency"))
    off.close()
    said.close()
    assert torch.equal(subject.now(), subject.usual)
    assert get_steer_status(subject.model).enabled


def test_three_closed_from_the_middle(subject):
    stacks = [ExitStack() for _ in range(3)]
    for stack, number in zip(stacks, (0, 1, 0), strict=True):
        stack.enter_context(subject.block("use_saliency", number))
    stacks[1].close()
    assert torch.equal(subject.now(), subject.inside("use_saliency", 0))
    stacks[2].close()
    assert torch.equal(subject.now(), subject.inside("use_saliency", 0))
    stacks[0].close()
    assert torch.equal(subject.now(), subject.usual)


@every
def test_one_that_raises_ends_what_it_began(subject, name):
    with pytest.raises(KeyError), subject.block(name):
        raise KeyError
    assert torch.equal(subject.now(), subject.usual)


def test_traces_closed_crosswise_hear_only_while_they_are_open(subject):
    first, second = ExitStack(), ExitStack()
    traces = [stack.enter_context(trace_steering(subject.model)) for stack in (first, second)]
    first.close()
    heard = len(traces[0].gates)
    generate(subject.model, subject.inputs)
    assert len(traces[1].steps()) == 6
    assert len(traces[0].gates) == heard
    second.close()
    generate(subject.model, subject.inputs)
    assert len(traces[1].steps()) == 6


def test_listeners_closed_crosswise_hear_only_while_they_are_open():
    model = patch_model(make_encoder_model("llava"), SteerConfig(aligners=(AlignerConfig(modality="image"),)))
    inputs, first, second = make_encoder_inputs("llava"), ExitStack(), ExitStack()
    listeners = [stack.enter_context(record_routing(model)) for stack in (first, second)]
    first.close()
    model(**inputs)
    assert listeners[1].read()
    assert not listeners[0].read()
    second.close()
    model(**inputs)
    assert not listeners[1].read()


def answers(subject, name, number=0):
    """A generator that calls the model inside a block, again and again."""
    with subject.block(name, number):
        while True:
            yield subject.now()


@every
def test_two_generators_closed_in_another_order(subject, name):
    expected = [subject.inside(name, number) for number in (0, 1)]
    first, second = answers(subject, name, 0), answers(subject, name, 1)
    for _ in range(2):
        assert torch.equal(next(first), expected[0])
        assert torch.equal(next(second), expected[1])
    first.close()
    assert torch.equal(next(second), expected[1])
    second.close()
    assert torch.equal(subject.now(), subject.usual)


@every
def test_what_a_suspended_generator_entered_never_reaches_its_caller(subject, name):
    answering = answers(subject, name)
    assert torch.equal(next(answering), subject.inside(name))
    assert torch.equal(subject.now(), subject.usual)
    assert torch.equal(generate(subject.model, subject.inputs), generate(Subject().model, subject.inputs))
    assert get_steer_status(subject.model) == get_steer_status(Subject().model)
    answering.close()
    assert torch.equal(subject.now(), subject.usual)


@every
def test_a_dropped_generator_leaves_nothing_behind(subject, name):
    answering = answers(subject, name)
    next(answering)
    del answering
    gc.collect()
    assert torch.equal(subject.now(), subject.usual)


@every
def test_a_context_manager_of_ones_own_is_a_block(subject, name):
    @contextmanager
    def own():
        with subject.block(name):
            yield

    @contextmanager
    def around():
        with own():
            yield

    for manager in (own, around):
        with manager():
            assert torch.equal(subject.now(), subject.inside(name))
            assert not torch.equal(subject.now(), subject.usual)
        assert torch.equal(subject.now(), subject.usual)
    with ExitStack() as stack:
        stack.enter_context(around())
        assert torch.equal(subject.now(), subject.inside(name))
    decorated = own()(subject.now)
    assert torch.equal(decorated(), subject.inside(name))
    assert torch.equal(subject.now(), subject.usual)


@every
@pytest.mark.parametrize("carries", [False, True])
def test_a_generator_pulled_by_a_pool_is_right_or_refused_and_ends(subject, name, carries):
    """As Starlette pulls a streaming response: each token in whatever worker is free, in a copy of the context."""
    answering = answers(subject, name)
    pools = [ThreadPoolExecutor(1) for _ in range(3)]

    def run(pool, act):
        return pool.submit(contextvars.copy_context().run, act) if carries else pool.submit(act)

    for pool in (*pools, pools[0]):
        if not right_or_refused(lambda p=pool: run(p, lambda: next(answering)).result(), subject.inside(name), "saliency=|thread"):
            break
    run(pools[1], answering.close).result()
    for pool in pools:
        assert torch.equal(pool.submit(subject.now).result(), subject.usual)
        pool.shutdown()
    assert torch.equal(subject.now(), subject.usual)


@every
def test_entered_in_one_worker_and_left_in_another(subject, name):
    """As a web framework runs the two halves of a dependency."""
    pools, block = [ThreadPoolExecutor(1) for _ in range(2)], subject.block(name)
    pools[0].submit(block.__enter__).result()
    pools[1].submit(block.__exit__, None, None, None).result()
    for pool in pools:
        assert torch.equal(pool.submit(subject.now).result(), subject.usual)
        pool.shutdown()
    assert torch.equal(subject.now(), subject.usual)


@every
def test_entered_in_a_copied_context_and_left_outside(subject, name):
    context, block = contextvars.copy_context(), subject.block(name)
    context.run(block.__enter__)
    assert torch.equal(context.run(subject.now), subject.inside(name))
    assert torch.equal(subject.now(), subject.usual)
    block.__exit__(None, None, None)
    assert torch.equal(context.run(subject.now), subject.usual)
    assert torch.equal(subject.now(), subject.usual)


@every
def test_a_context_copied_inside_a_block_holds_it_until_it_ends(subject, name):
    with subject.block(name):
        context = contextvars.copy_context()
        assert torch.equal(context.run(subject.now), subject.inside(name))
    assert torch.equal(context.run(subject.now), subject.usual)


@every
def test_tasks_that_take_turns_keep_their_own(subject, name):
    async def answer(number):
        found = []
        with subject.block(name, number):
            for _ in range(3):
                found.append(subject.now())
                await asyncio.sleep(0)
        return found

    async def main():
        tasks = [asyncio.create_task(answer(number)) for number in (0, 1)]
        await asyncio.sleep(0)
        outside = subject.now()
        return outside, await asyncio.gather(*tasks)

    outside, found = asyncio.run(main())
    assert torch.equal(outside, subject.usual)
    for number, own in enumerate(found):
        assert all(torch.equal(one, subject.inside(name, number)) for one in own)
    assert torch.equal(subject.now(), subject.usual)


@every
def test_an_asynchronous_generator_that_the_loop_closes(subject, name):
    """The loop ends what was left open in a context of its own."""

    async def stream():
        with subject.block(name):
            while True:
                yield subject.now()

    async def main():
        left = stream()
        first = await anext(left)
        outside = subject.now()
        return first, outside, left

    first, outside, _ = asyncio.run(main())
    assert torch.equal(first, subject.inside(name))
    assert torch.equal(outside, subject.usual)
    assert torch.equal(subject.now(), subject.usual)
