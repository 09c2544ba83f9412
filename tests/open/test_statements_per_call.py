"""`saliency=` of one call: the same as a block around it, in any thread, pipeline or wrapper, and nothing is left over."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from kit.asking import (
    PICTURES,
    cache_for,
    generate,
    logits,
    look,
    plain_generate,
    plain_logits,
    prompt,
    steered,
    with_cache,
)
from kit.tiny import make_model, make_prompt
from kit.tiny_encoders import make_encoder_model
from kit.words import make_tokenizer
from transformers import TextIteratorStreamer

from hf_steer import (
    AlignerConfig,
    PatchError,
    Saliency,
    SaliencyError,
    SteerConfig,
    disable_steering,
    get_steer_status,
    patch_model,
    unpatch_model,
    use_saliency,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it


@pytest.fixture
def asked():
    model, inputs = steered("qwen2"), prompt("qwen2")
    return model, inputs, look(inputs)


def box():
    return Saliency.from_boxes((0, 0, 10, 10), (30, 30))


def test_a_call_with_a_statement_equals_the_block(asked):
    model, inputs, said = asked
    assert torch.equal(logits(model, inputs, saliency=said), logits(model, inputs, said))
    assert not torch.equal(logits(model, inputs, saliency=said), plain_logits(model, inputs))


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_generate_with_a_statement_equals_the_block(asked, how):
    model, inputs, said = asked
    found = generate(model, inputs, saliency=said, **how)
    assert torch.equal(found, generate(model, inputs, said, **how))
    assert not torch.equal(found, plain_generate(model, inputs, **how))


def test_pictures_take_boxes_per_call():
    model, inputs = steered("qwen2_vl"), make_prompt("qwen2_vl", PICTURES)
    assert torch.equal(logits(model, inputs, saliency=box()), logits(model, inputs, box()))
    assert torch.equal(generate(model, inputs, saliency=box()), generate(model, inputs, box()))
    assert not torch.equal(logits(model, inputs, saliency=box()), logits(model, inputs))


def test_the_base_model_takes_one_too(asked):
    model, inputs, said = asked
    with torch.no_grad():
        found = model.model(**inputs, saliency=said).last_hidden_state
        with use_saliency(model, said):
            assert torch.equal(found, model.model(**inputs).last_hidden_state)


def test_the_inner_statement_wins(asked):
    model, inputs, said = asked
    with use_saliency(model, look(inputs, seed=1)):
        assert torch.equal(logits(model, inputs, saliency=said), logits(model, inputs, said))
        assert torch.equal(generate(model, inputs, saliency=said), generate(model, inputs, said))


def test_off_stays_off(asked):
    model, inputs, said = asked
    with disable_steering(model):
        assert torch.equal(logits(model, inputs, saliency=said), logits(unpatch_model(steered("qwen2")), inputs))
        assert torch.equal(generate(model, inputs, saliency=said), generate(make_model("qwen2"), inputs))


def test_nothing_is_left_over_for_the_next_call(asked):
    model, inputs, said = asked
    plain, tokens = plain_logits(model, inputs), plain_generate(model, inputs)
    logits(model, inputs, saliency=said)
    assert torch.equal(logits(model, inputs), plain)
    generate(model, inputs, saliency=said)
    assert torch.equal(generate(model, inputs), tokens)
    assert get_steer_status(model).saliency is None


@pytest.mark.parametrize("call", [logits, generate])
def test_nothing_is_left_over_after_a_call_that_failed(asked, call):
    model, inputs, said = asked
    plain = plain_logits(model, inputs)
    with pytest.raises(SaliencyError, match="token saliency has shape"):
        call(model, inputs, saliency=Saliency.from_tokens(torch.randn(1, 4)))

    def stop(module, args, kwargs):
        raise MemoryError("injected")

    hook = model.get_decoder().layers[1].register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(MemoryError, match="injected"):
        call(model, inputs, saliency=said)
    hook.remove()
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("call", [logits, generate])
def test_what_is_no_statement_is_refused(asked, call):
    model, inputs, _ = asked
    for wrong in (torch.randn(1, 9), [[1.0]], "the cat", 3.0):
        with pytest.raises(SaliencyError, match=rf"Saliency.*got {type(wrong).__name__}"):
            call(model, inputs, saliency=wrong)
    assert torch.equal(logits(model, inputs, saliency=None), plain_logits(model, inputs))


@pytest.mark.parametrize("call", [logits, generate])
def test_a_model_without_a_gaze_refuses_a_statement(call):
    model = patch_model(make_encoder_model("llava"), SteerConfig(aligners=(AlignerConfig(modality="image"),)))
    inputs = {"input_ids": torch.randint(2, 80, (1, 5))}
    with pytest.raises(PatchError, match="attention=None"):
        call(model, inputs, saliency=look(inputs))


def test_an_unpatched_model_knows_no_such_argument(asked):
    model, inputs, said = asked
    unpatch_model(model)
    with pytest.raises(ValueError, match="saliency"):
        generate(model, inputs, saliency=said)


def test_a_thread_of_its_own_is_steered(asked):
    model, inputs, said = asked
    expected, found = generate(model, inputs, said), []
    thread = threading.Thread(target=lambda: found.append(generate(model, inputs, saliency=said)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


def test_a_streamers_thread_is_steered(asked):
    model, inputs, said = asked
    expected, tokenizer = generate(model, inputs, said), make_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)

    def work():
        try:
            generate(model, inputs, streamer=streamer, saliency=said)
        finally:
            streamer.end()

    thread = threading.Thread(target=work)
    thread.start()
    heard = "".join(streamer)
    thread.join()
    assert heard == tokenizer.decode(expected[0, 9:])


def test_a_pool_serves_every_request_with_its_own(asked):
    model, inputs, _ = asked
    statements = [look(inputs, seed) for seed in range(6)]
    expected = [generate(model, inputs, said) for said in statements]
    assert len({tuple(row[0].tolist()) for row in expected}) > 1
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda said: generate(model, inputs, saliency=said), statements))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_lora_hands_the_statement_on(asked):
    model, inputs, said = asked
    expected, tokens = logits(model, inputs, said), generate(model, inputs, said)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    assert torch.equal(logits(wrapped, inputs, saliency=said), expected)
    assert torch.equal(generate(wrapped, inputs, saliency=said), tokens)


def test_training_takes_one_per_batch(asked):
    model, inputs, said = asked
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"], saliency=said).loss
    with use_saliency(model, said):
        assert torch.equal(loss, model(**inputs, labels=inputs["input_ids"]).loss)


def test_a_loop_of_ones_own_says_it_once_and_the_cache_remembers(asked):
    model, inputs, said = asked
    found, expected = [], []
    for loop, statement in ((found, {"saliency": said}), (expected, {})):
        cache = cache_for(model)
        with use_saliency(model, said):
            loop.append(logits(model, inputs, **with_cache(model, cache), **statement))
        loop.append(logits(model, {"input_ids": torch.tensor([[5]])}, **with_cache(model, cache)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
